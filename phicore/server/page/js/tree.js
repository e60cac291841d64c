/* A conversation is a tree of messages; what is shown is one way through it. */

const ROOT = '';

/** The messages of a conversation. */
export class Tree {
  constructor(messages = []) {
    this.messages = new Map();
    this.below = new Map(); // from the id of a message to what follows it, the oldest first
    [...messages].sort(byAge).forEach((message) => this.add(message));
  }

  add(message) {
    const siblings = this.children(message.parent);
    const at = siblings.findIndex(({ id }) => id === message.id);
    if (at >= 0) siblings[at] = message;
    else siblings.push(message);
    this.below.set(message.parent ?? ROOT, siblings);
    this.messages.set(message.id, message);
  }

  get(id) {
    return this.messages.get(id);
  }

  children(parent) {
    return this.below.get(parent ?? ROOT) ?? [];
  }

  /** Return the message and those that stand beside it. */
  siblings(message) {
    return this.children(message.parent);
  }

  /**
   * Return the messages that are shown.
   * @param {Object} chosen From a message to the one that was chosen below it; else the newest is.
   */
  path(chosen) {
    const found = [];
    for (let parent = null; ; parent = found.at(-1).id) {
      const children = this.children(parent);
      if (!children.length) return found;
      found.push(children.find(({ id }) => id === chosen[parent ?? ROOT]) ?? children.at(-1));
    }
  }

  /** Return the messages from the first one to this one. */
  upTo(message) {
    const found = [];
    for (let each = message; each; each = this.get(each.parent)) found.unshift(each);
    return found;
  }
}

/** Return `chosen`, changed so that a message is shown. */
export function choosing(tree, chosen, message) {
  const found = { ...chosen };
  for (const { id, parent } of tree.upTo(message)) found[parent ?? ROOT] = id;
  return found;
}

function byAge(a, b) {
  return a.created - b.created || (a.id < b.id ? -1 : 1);
}
