/* Finds conversations by their titles and by the text of all their messages. */

const BEFORE = 24;
const AFTER = 60;

/**
 * Return the conversations that have all words of a query, the newest first.
 * @returns {Promise<Array<{conversation: Object, snippet: ?Array<string>}>>} With the text around
 *   the first word, in three parts, if it is in a message.
 */
export async function found(chat, query) {
  const all = [...chat.list].sort((a, b) => b.updated - a.updated);
  if (!query) return all.map((conversation) => ({ conversation, snippet: null }));
  const words = folded(query).split(/\s+/);
  const texts = new Map(all.map(({ id }) => [id, []]));
  for (const { conversation, text, attachments = [] } of await chat.store.allMessages()) {
    texts.get(conversation)?.push(text, ...attachments.map((each) => each.name));
  }
  return all.flatMap((conversation) => {
    const parts = [conversation.title, ...texts.get(conversation.id)];
    const lower = parts.map(folded);
    if (!words.every((word) => lower.some((part) => part.includes(word)))) return [];
    if (words.every((word) => lower[0].includes(word))) return [{ conversation, snippet: null }];
    const word = words.find((each) => !lower[0].includes(each));
    const at = lower.findIndex((part) => part.includes(word));
    return [{ conversation, snippet: snippetOf(parts[at], lower[at].indexOf(word), word.length) }];
  });
}

/** Lower case, with the length of the text, so that places in it are places in the text. */
function folded(text) {
  const lower = text.toLowerCase();
  return lower.length === text.length ? lower : text.replaceAll(/[A-Z]/g, (c) => c.toLowerCase());
}

function snippetOf(text, at, length) {
  const start = Math.max(0, at - BEFORE);
  const end = at + length;
  const before = (start > 0 ? '…' : '') + text.slice(start, at);
  return [before, text.slice(at, end), text.slice(end, end + AFTER)];
}
