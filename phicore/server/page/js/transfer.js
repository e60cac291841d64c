/* Export and import of all conversations as one JSON file, which is checked before it is used. */

import { newId } from './store.js';

const FORMAT = 'phicore-conversations';
const VERSION = 1;
const STATES = ['running', 'done', 'stopped', 'broken', 'failed'];

/** Return the text of a file with conversations and their messages. */
export function exported(conversations, messages) {
  const kept = conversations.filter(({ deleted }) => !deleted);
  const ids = new Set(kept.map(({ id }) => id));
  const content = {
    format: FORMAT,
    version: VERSION,
    exported: new Date().toISOString(),
    conversations: kept,
    messages: messages.filter(({ conversation }) => ids.has(conversation)),
  };
  return JSON.stringify(content, null, 1);
}

/**
 * Read a file.
 * @returns {{conversations: Array, messages: Array}} What it holds, without unknown fields.
 * @throws {Error} If it is none of ours, of a later version, or damaged; the message says where.
 */
export function imported(text) {
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Error('The file is not JSON.');
  }
  if (content?.format !== FORMAT) throw new Error('The file has no conversations of phicore.');
  if (content.version !== VERSION) {
    throw new Error(`The file has version ${content.version}; this page reads ${VERSION}.`);
  }
  const conversations = each(content, 'conversations', conversation);
  const messages = each(content, 'messages', message);
  checkLinks(conversations, messages);
  return { conversations, messages };
}

/**
 * Return what of a file is to be written.
 *
 * Messages that are here already stay as they are. A conversation whose messages differ from those
 * with the same ids here comes as a copy.
 */
export function merged(found, here) {
  const known = new Map(here.messages.map((message) => [message.id, message]));
  const knownIds = new Map(here.conversations.map((each) => [each.id, each]));
  const changes = { conversations: [], messages: [] };
  const counts = { added: 0, completed: 0, same: 0 };
  for (const each of found.conversations) {
    const messages = found.messages.filter(({ conversation }) => conversation === each.id);
    const isOther = (message) => {
      const other = known.get(message.id);
      return (
        other &&
        (other.conversation !== each.id ||
          other.text !== message.text ||
          other.parent !== message.parent ||
          other.role !== message.role)
      );
    };
    if (messages.some(isOther)) {
      const copy = copied(each, messages);
      changes.conversations.push(copy.conversation);
      changes.messages.push(...copy.messages);
      counts.added++;
      continue;
    }
    const added = messages.filter(({ id }) => !known.has(id));
    const old = knownIds.get(each.id);
    if (!old || old.deleted) changes.conversations.push(each);
    changes.messages.push(...added);
    counts[!old || old.deleted ? 'added' : added.length ? 'completed' : 'same']++;
  }
  return { changes, counts };
}

function copied(conversation, messages) {
  const ids = new Map([['', ''], ...messages.map(({ id }) => [id, newId()])]);
  const id = newId();
  const chosen = Object.entries(conversation.chosen)
    .filter(([parent, child]) => ids.has(parent) && ids.has(child))
    .map(([parent, child]) => [ids.get(parent), ids.get(child)]);
  return {
    conversation: { ...conversation, id, chosen: Object.fromEntries(chosen) },
    messages: messages.map((message) => ({
      ...message,
      id: ids.get(message.id),
      parent: message.parent === null ? null : ids.get(message.parent),
      conversation: id,
    })),
  };
}

// ---- checks ------------------------------------------------------------------------------------

function each(content, name, read) {
  if (!Array.isArray(content[name])) throw new Error(`The file is damaged: ${name} is no list.`);
  return content[name].map((value, i) => {
    const where = `${name}[${i}]`;
    return read((field, check, fallback) => {
      const given = value?.[field] ?? fallback;
      if (given === undefined || !check(given)) {
        throw new Error(`The file is damaged: ${where}.${field} is missing or wrong.`);
      }
      return given;
    });
  });
}

const isText = (value) => typeof value === 'string';
const isId = (value) => isText(value) && /^[\w-]{1,64}$/.test(value);
const isTime = (value) => Number.isFinite(value) && value >= 0;
const isObject = (value) => typeof value === 'object' && !Array.isArray(value);
const isNumbers = (value) => isObject(value) && Object.values(value).every(Number.isFinite);
const orNull = (check) => (value) => value === null || check(value);

function conversation(field) {
  return {
    id: field('id', isId),
    title: field('title', isText, ''),
    created: field('created', isTime),
    updated: field('updated', isTime),
    system: field('system', isText, ''),
    sampling: field('sampling', isNumbers, {}),
    chosen: field('chosen', (value) => isObject(value) && Object.values(value).every(isText), {}),
    deleted: null,
  };
}

function message(field) {
  const found = {
    id: field('id', isId),
    conversation: field('conversation', isId),
    parent: field('parent', orNull(isId), null),
    role: field('role', (value) => ['user', 'assistant'].includes(value)),
    text: field('text', isText),
    created: field('created', isTime),
    attachments: field('attachments', isAttachments, []),
  };
  if (found.role === 'user') return found;
  const edited = field('edited', Number.isInteger, 0); // by the user
  if (edited) found.edited = edited;
  const state = field('state', (value) => STATES.includes(value), 'done');
  return {
    ...found,
    state: state === 'running' ? 'broken' : state,
    finish: field('finish', orNull(isText), null),
    model: field('model', orNull(isText), null),
    fingerprint: field('fingerprint', orNull(isText), null),
    seed: field('seed', orNull(Number.isFinite), null),
    sampling: field('sampling', isNumbers, {}),
    system: field('system', isText, ''),
    figures: field('figures', orNull(isNumbers), null),
    omitted: field('omitted', Number.isInteger, 0),
    error: field(
      'error',
      orNull((value) => isObject(value) && isText(value.message)),
      null,
    ),
  };
}

function isAttachments(value) {
  return Array.isArray(value) && value.every(({ name, text } = {}) => isText(name) && isText(text));
}

/** Check that ids are unique, that parents are there, and that no message is above itself. */
function checkLinks(conversations, messages) {
  const problem = (what) => new Error(`The file is damaged: ${what}.`);
  const known = new Set(conversations.map(({ id }) => id));
  const byId = new Map(messages.map((each) => [each.id, each]));
  if (known.size < conversations.length || byId.size < messages.length) {
    throw problem('an id occurs twice');
  }
  const good = new Set([null]);
  for (const each of messages) {
    const way = new Set();
    let at = each;
    while (at && !good.has(at.id)) {
      if (way.has(at.id)) throw problem(`message ${each.id} is above itself`);
      way.add(at.id);
      const parent = at.parent === null ? null : byId.get(at.parent);
      const isLost = parent === undefined || (parent && parent.conversation !== at.conversation);
      if (isLost || !known.has(at.conversation)) throw problem(`message ${at.id} has no place`);
      at = parent;
    }
    way.forEach((id) => good.add(id));
  }
}
