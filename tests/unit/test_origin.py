"""The repository that a file was made from, of which a tokenizer.json can be fetched."""

from phicore.text.tokenizer_keys import origin

SOURCE = "general.source.repo_url"
BASE = "general.base_model.0.repo_url"


def test_origin_on_the_hub_comes_before_others():
    hub, other = "https://huggingface.co/a/b", "https://example.com/a/b"
    assert origin({SOURCE: other, BASE: hub}) == hub
    assert origin({SOURCE: hub, BASE: f"{hub}-instruct"}) == hub
    assert origin({SOURCE: other, BASE: 3}) == other
    assert origin({}) is None
