/*
 * Conversations, kept in the browser's IndexedDB: one record for a conversation and one for each
 * message, so that two tabs that write at the same time lose nothing.
 *
 * A conversation has id, title, created, updated (milliseconds), system, sampling, chosen (which
 * answer or question is shown below each message) and deleted (a time, or null).
 * A message has id, conversation, parent (an id, or null), role, text and created; see chat.js.
 */

const NAME = 'phicore';
const VERSION = 1;
const STORES = ['conversations', 'messages'];

/** Return an identifier that nobody else has. (crypto.randomUUID needs https.) */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** Open the store. If the browser keeps nothing, the store is in memory and `problem` says why. */
export async function openStore() {
  try {
    const database = await opened();
    return new Store(database);
  } catch (error) {
    return new MemoryStore(error?.message || 'IndexedDB cannot be opened');
  }
}

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, VERSION);
    request.onupgradeneeded = () => {
      request.result.createObjectStore('conversations', { keyPath: 'id' });
      const messages = request.result.createObjectStore('messages', { keyPath: 'id' });
      messages.createIndex('conversation', 'conversation');
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error('another tab has an older version of this page'));
  });
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

class Store {
  problem = null;

  constructor(database) {
    this.database = database;
    database.onversionchange = () => database.close();
  }

  conversations() {
    return result(this.reading('conversations').getAll());
  }

  allMessages() {
    return result(this.reading('messages').getAll());
  }

  messages(conversation) {
    return result(this.reading('messages').index('conversation').getAll(conversation));
  }

  reading(name) {
    return this.database.transaction(name).objectStore(name);
  }

  /** Write conversations and messages, all or none. */
  put({ conversations = [], messages = [] }) {
    this.isPersistent ??= navigator.storage?.persist?.().catch(() => false) ?? false;
    return this.change((stores) => {
      for (const each of conversations) stores.conversations.put(each);
      for (const each of messages) stores.messages.put(each);
    });
  }

  /** Remove a conversation and its messages for good. */
  async remove(conversation) {
    const messages = await this.messages(conversation);
    await this.change((stores) => {
      stores.conversations.delete(conversation);
      for (const { id } of messages) stores.messages.delete(id);
    });
  }

  change(make) {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(STORES, 'readwrite');
      transaction.oncomplete = () => resolve();
      transaction.onabort = transaction.onerror = () => reject(transaction.error);
      make(Object.fromEntries(STORES.map((name) => [name, transaction.objectStore(name)])));
    });
  }
}

/** The same, in memory. */
class MemoryStore {
  constructor(problem) {
    this.problem = problem;
    this.kept = { conversations: new Map(), messages: new Map() };
  }

  async conversations() {
    return structuredClone([...this.kept.conversations.values()]);
  }

  async allMessages() {
    return structuredClone([...this.kept.messages.values()]);
  }

  async messages(conversation) {
    return (await this.allMessages()).filter((message) => message.conversation === conversation);
  }

  async put(changes) {
    for (const [name, records] of Object.entries(changes)) {
      for (const each of records) this.kept[name].set(each.id, structuredClone(each));
    }
  }

  async remove(conversation) {
    this.kept.conversations.delete(conversation);
    for (const { id } of await this.messages(conversation)) this.kept.messages.delete(id);
  }
}
