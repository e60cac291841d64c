/* Markdown within a paragraph: emphasis, code, links. Texts become nodes (see dom.js). */

const ORDINARY = /[^\\`\n*_~[!<h]+/y;
const CODE = /`+/y;
const RUN = /\*+|_+|~+/y;
const ESCAPED = /\\([!-/:-@[-`{-~])/y;
const BREAK = /<br *\/?>/iy;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/iy;
const BARE_LINK = /https?:\/\/[^\s<>"`\\*]+/iy;
const TARGET =
  /\(\s*(<[^<>\n]*>|[^\s()<]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
const SAFE = /^(?:https?:\/\/|mailto:)/i;
const LONGEST_LABEL = 1000;
const DEEPEST = 8;

export function node(tag, children = [], attributes = {}) {
  return { tag, attributes, children };
}

/**
 * Read the Markdown of a paragraph.
 * @param {string} text The text.
 * @param {boolean} isOpen Whether more text will come: what is not closed then counts as closed,
 *   so that its look does not change later.
 * @returns {Array} Nodes.
 */
export function inline(text, isOpen = false, depth = 0, hasLinks = true) {
  if (depth > DEEPEST) return [text];
  return new Reader(text, isOpen, depth, hasLinks).read();
}

class Reader {
  constructor(text, isOpen, depth, hasLinks) {
    this.text = text;
    this.isOpen = isOpen;
    this.depth = depth;
    this.hasLinks = hasLinks;
    this.at = 0;
    this.items = []; // texts, nodes, and runs of marks: objects with `mark`
    this.codes = null;
  }

  read() {
    while (this.at < this.text.length) {
      this.take(ORDINARY, ([found]) => this.add(found)) ||
        this.escape() ||
        this.code() ||
        this.line() ||
        this.run() ||
        this.link() ||
        this.add(this.text[this.at++]);
    }
    return emphasized(this.items, this.isOpen);
  }

  /** Add a text or a node. */
  add(item) {
    const last = this.items.length - 1;
    if (typeof item === 'string' && typeof this.items[last] === 'string') this.items[last] += item;
    else this.items.push(item);
    return true;
  }

  /** If an expression matches here, go past it and let a function use what it has found. */
  take(expression, use) {
    expression.lastIndex = this.at;
    const found = expression.exec(this.text);
    if (found === null) return false;
    this.at += found[0].length;
    use(found);
    return true;
  }

  escape() {
    return this.take(ESCAPED, ([, mark]) => this.add(mark));
  }

  code() {
    if (this.text[this.at] !== '`') return false;
    CODE.lastIndex = this.at;
    const [marks] = CODE.exec(this.text);
    const start = this.at + marks.length;
    let end = this.closing(marks.length, start);
    if (end < 0 && this.isOpen && marks.length < 3) end = this.text.length;
    if (end < 0) {
      this.at = start;
      return this.add(marks);
    }
    let code = this.text.slice(start, end).replaceAll('\n', ' ');
    if (code.startsWith(' ') && code.endsWith(' ') && code.trim()) code = code.slice(1, -1);
    this.at = end + marks.length;
    return this.add(node('code', [code]));
  }

  /** Return where the next run of so many backticks begins, -1 if there is none. */
  closing(length, from) {
    if (this.codes === null) {
      this.codes = new Map();
      for (const { 0: marks, index } of this.text.matchAll(/`+/g)) {
        if (!this.codes.has(marks.length)) this.codes.set(marks.length, []);
        this.codes.get(marks.length).push(index);
      }
    }
    const places = this.codes.get(length) ?? [];
    while (places.length && places[0] < from) places.shift();
    return places[0] ?? -1;
  }

  /** An end of a line in the text is one in what is shown, as in most programs for chats. */
  line() {
    if (this.text[this.at] !== '\n') return this.take(BREAK, () => this.add(node('br')));
    const last = this.items.length - 1;
    if (typeof this.items[last] === 'string') {
      this.items[last] = this.items[last].replace(/(?:[ \t]+|\\)$/, '');
    }
    this.at++;
    while (' \t'.includes(this.text[this.at] ?? 'x')) this.at++;
    return this.add(node('br'));
  }

  run() {
    const start = this.at;
    return this.take(RUN, ([marks]) => {
      const before = this.text.slice(Math.max(0, start - 2), start).match(/.$/su)?.[0] ?? ' ';
      const after = this.text.slice(this.at, this.at + 2).match(/^./su)?.[0] ?? ' ';
      const isLeft = flanks(after, before);
      const isRight = flanks(before, after);
      const isWord = marks[0] === '_';
      this.items.push({
        mark: marks[0],
        count: marks.length,
        whole: marks.length,
        canOpen: isLeft && (!isWord || !isRight || isPunctuation(before)),
        canClose: isRight && (!isWord || !isLeft || isPunctuation(after)),
      });
    });
  }

  link() {
    const isImage = this.text.startsWith('![', this.at);
    if (isImage || this.text[this.at] === '[') return this.labelled(this.at + (isImage ? 2 : 1));
    if (!this.hasLinks) return false;
    if (this.take(AUTOLINK, ([, url]) => this.add(anchor(url, [url])))) return true;
    if (/[\p{L}\p{N}]/u.test(this.text[this.at - 1] ?? ' ')) return false;
    BARE_LINK.lastIndex = this.at;
    const found = BARE_LINK.exec(this.text);
    if (found === null) return false;
    let url = found[0].replace(/[.,;:!?'_~\]]+$/, '');
    while (url.endsWith(')') && url.split(')').length > url.split('(').length) {
      url = url.slice(0, -1);
    }
    this.at += url.length;
    return this.add(anchor(url, [url]));
  }

  /** Read [label](target), or an image, which becomes a link: the page loads nothing. */
  labelled(start) {
    const end = this.labelEnd(start);
    if (end < 0) return false;
    TARGET.lastIndex = end + 1;
    const found = TARGET.exec(this.text);
    const isPartial =
      this.isOpen && found === null && /^\([^\s()]*$/.test(this.text.slice(end + 1));
    if (found === null && !isPartial) return false;
    const url = (found?.[1] ?? '').replace(/^<|>$/g, '');
    const label = inline(this.text.slice(start, end), false, this.depth + 1, false);
    this.at = found === null ? this.text.length : TARGET.lastIndex;
    if (this.hasLinks && SAFE.test(url)) return this.add(anchor(url, label.length ? label : [url]));
    label.forEach((item) => this.add(item));
    return true;
  }

  /** Return where the bracket closes that has opened before `start`, -1 if it does not. */
  labelEnd(start) {
    const last = Math.min(this.text.length, start + LONGEST_LABEL);
    let depth = 1;
    for (let i = start; i < last; i++) {
      if (this.text[i] === '\\') i++;
      else if (this.text[i] === '[') depth++;
      else if (this.text[i] === ']' && --depth === 0) return i;
    }
    return -1;
  }
}

function anchor(url, children) {
  return node('a', children, { href: url, target: '_blank', rel: 'noopener noreferrer' });
}

function isPunctuation(character) {
  return /[\p{P}\p{S}]/u.test(character);
}

/** Return whether marks that touch `inner` may begin or end emphasis there. */
function flanks(inner, outer) {
  if (/\s/.test(inner)) return false;
  return !isPunctuation(inner) || /\s/.test(outer) || isPunctuation(outer);
}

const TAGS = { '*1': 'em', '*2': 'strong', _1: 'em', _2: 'strong', '~1': 'del', '~2': 'del' };

const FARTHEST = 20; // openers that are looked at for each run

/** Return whether a run may close emphasis that another one opens (CommonMark's rules 9 and 10). */
function fits(opener, run, { count }) {
  if (run.mark === '~') return opener.count === run.count && run.count <= 2;
  const isBoth = opener.canClose || run.canOpen;
  return !isBoth || (opener.whole + count) % 3 !== 0 || (opener.whole % 3 === 0 && count % 3 === 0);
}

/** Turn runs of marks into emphasis; those that have no partner are text. */
function emphasized(items, isOpen) {
  const out = [];
  const openers = { '*': [], _: [], '~': [] }; // where they are in `out`
  const wrap = (index, size) => {
    const opener = out[index];
    const inside = merged(out.splice(index + 1));
    for (const places of Object.values(openers)) while (places.at(-1) > index) places.pop();
    opener.count -= size;
    if (opener.count === 0) {
      out.pop();
      openers[opener.mark].pop();
    }
    out.push(node(TAGS[opener.mark + size], inside));
  };
  for (const item of items) {
    if (item.mark === undefined) {
      out.push(item);
      continue;
    }
    const run = { ...item };
    const places = openers[run.mark];
    while (run.canClose && run.count > 0) {
      const place = places.slice(-FARTHEST).findLast((place) => fits(out[place], run, item));
      if (place === undefined) break;
      const size = run.mark === '~' ? run.count : Math.min(2, out[place].count, run.count);
      wrap(place, size);
      run.count -= size;
    }
    if (run.count === 0) continue;
    if (run.canOpen) places.push(out.length);
    out.push(run);
  }
  const open = openers['*'].at(-1);
  if (isOpen && open !== undefined && out[open].count === 2) wrap(open, 2);
  return merged(out);
}

/** Return items whose runs are text, neighbouring texts being one. */
function merged(items) {
  const found = [];
  for (const item of items) {
    const shown = item.mark === undefined ? item : item.mark.repeat(item.count);
    const last = found.length - 1;
    if (typeof shown === 'string' && typeof found[last] === 'string') found[last] += shown;
    else found.push(shown);
  }
  return found;
}
