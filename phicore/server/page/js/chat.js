/*
 * The conversations: what is there, what is shown, and how answers are asked for.
 *
 * A question is a message with role "user", text and attachments. An answer is one with role
 * "assistant", text and
 *   state     "running", "done", "stopped", "broken" (the connection) or "failed" (no text came)
 *   finish    why the model ended: "stop" or "length"
 *   seed, sampling, system, model, fingerprint   what the answer was made with
 *   figures   numbers: firstS, tokensPerS, promptTokens, cachedTokens, tokens, context
 *   omitted   how many of the oldest messages were left out
 *   error     {message, status, code}
 */

import * as api from './api.js';
import { bodyOf, count, fill } from './asking.js';
import { newId } from './store.js';
import { choosing, Tree } from './tree.js';

const SAVE_EVERY_MS = 1000;
const KEEP_DELETED_MS = 600000; // longer than another tab offers to undo it
const TITLE_LENGTH = 60;

/**
 * The conversations. Events: "list" (they have changed), "change" (what is shown has changed),
 * "text" (an answer has more text), "lost" (the server does not answer) and "problem" (the browser
 * keeps nothing).
 */
export class Chat extends EventTarget {
  constructor(store, defaults) {
    super();
    this.store = store;
    this.defaults = defaults; // () => {system, sampling} of new conversations
    this.list = [];
    this.current = null;
    this.tree = new Tree();
    this.trees = new Map(); // of conversations with running answers, by id
    this.running = new Map(); // AbortControllers, by the id of the answer
    this.model = null;
    this.needKey = async () => false; // asks for a key; tells whether there is a new one
    this.channel = globalThis.BroadcastChannel ? new BroadcastChannel('phicore') : null;
    this.channel?.addEventListener('message', ({ data }) => this.otherTab(data));
  }

  /** Read the list of conversations. Those that were deleted long ago are removed for good. */
  async load() {
    const all = await this.store.conversations();
    const isOld = ({ deleted }) => deleted && deleted < Date.now() - KEEP_DELETED_MS;
    for (const { id } of all.filter(isOld)) await this.store.remove(id);
    const known = new Map(this.list.map((each) => [each.id, each]));
    this.list = all
      .filter(({ deleted }) => !deleted)
      .map((each) => {
        const { chosen } = known.get(each.id) ?? each;
        return Object.assign(known.get(each.id) ?? each, { ...each, chosen });
      });
    this.tell('list');
  }

  /** Show a conversation; null shows a new one, which is kept once something is said in it. */
  async open(id) {
    const turn = (this.turn = {});
    const found = this.list.find((each) => each.id === id) ?? null;
    const tree = found && (this.trees.get(id) ?? new Tree(await this.store.messages(id)));
    if (turn !== this.turn) return; // meanwhile, another one is to be shown
    const time = Date.now();
    const made = {
      id: newId(),
      title: '',
      created: time,
      updated: time,
      chosen: {},
      deleted: null,
    };
    this.current = found ?? { ...made, ...structuredClone(this.defaults()) };
    this.tree = tree ?? new Tree();
    this.tell('change');
  }

  get path() {
    return this.tree.path(this.current.chosen);
  }

  /** Return whether an answer in a conversation is being written in this tab. */
  isRunning(conversation = this.current) {
    const tree = this.trees.get(conversation?.id);
    return [...this.running.keys()].some((id) => tree?.get(id));
  }

  /** Return the running answer that is shown, if there is one. */
  get shownRunning() {
    return this.path.find(({ id }) => this.running.has(id));
  }

  stop() {
    this.running.get(this.shownRunning?.id)?.abort();
  }

  // ---- changes ---------------------------------------------------------------------------------

  /** Ask a question at the end of what is shown. */
  send(text, attachments = []) {
    return this.askAfter(this.path.at(-1)?.id ?? null, text, attachments);
  }

  /** Ask a question anew beside an earlier one. */
  edit(message, text) {
    return this.askAfter(message.parent, text, message.attachments);
  }

  async askAfter(parent, text, attachments) {
    const { current, tree } = this;
    const question = { ...this.message('user', parent, text), attachments };
    if (!current.title) current.title = titleOf(text || attachments[0]?.name || '');
    await this.add(current, tree, question);
    await this.answer(question, {}, { current, tree });
  }

  /** Keep a changed text of an answer beside the answer. */
  async editAnswer(message, text) {
    const edited = { ...this.message('assistant', message.parent, text), state: 'done' };
    await this.add(this.current, this.tree, { ...edited, edited: 1 });
  }

  /** Answer again: with a new seed unless one is set, or with that of an answer. */
  again(message, { repeats = false } = {}) {
    const question = this.tree.get(message.parent);
    if (!repeats) return this.answer(question);
    const { seed, sampling, system, omitted } = message;
    return this.answer(question, { sampling: { ...sampling, seed }, system, omitted });
  }

  /** Show another message that stands beside one. */
  async choose(message) {
    this.current.chosen = choosing(this.tree, this.current.chosen, message);
    await this.keep(this.current);
  }

  /** Change fields of a conversation. */
  async update(conversation, changes) {
    Object.assign(conversation, changes);
    if (this.list.includes(conversation)) await this.keep(conversation);
    else this.tell('change');
  }

  /** Delete a conversation; `restore` brings it back until the page is loaded again. */
  async remove(conversation) {
    for (const id of this.running.keys()) {
      if (this.trees.get(conversation.id)?.get(id)) this.running.get(id).abort();
    }
    this.list = this.list.filter((each) => each !== conversation);
    await this.keep(conversation, { deleted: Date.now() });
    if (this.current === conversation) await this.open(null);
  }

  async restore(conversation) {
    this.list.push(conversation);
    await this.keep(conversation, { deleted: null });
  }

  /** Write what was imported. */
  async take(changes) {
    await this.store.put(changes);
    this.channel?.postMessage({});
    await this.load();
    if (this.list.includes(this.current)) await this.open(this.current.id);
  }

  // ---- answers ---------------------------------------------------------------------------------

  /** Ask the server for an answer to a question, and show it as it comes. */
  async answer(question, given = {}, { current, tree } = this) {
    const { system, sampling, omitted = 0 } = { ...structuredClone(current), ...given };
    const answer = {
      ...this.message('assistant', question.id, '', { current, tree }),
      ...{ state: 'running', finish: null, seed: null, model: null, fingerprint: null },
      ...{ sampling, system, omitted, figures: null, error: null },
    };
    const controller = new AbortController();
    this.running.set(answer.id, controller);
    this.trees.set(current.id, tree);
    await this.add(current, tree, answer);
    try {
      await fill(answer, bodyOf(answer, tree), {
        signal: controller.signal,
        flow: (why) => this.flow(answer, why),
        needKey: (problem) => this.needKey(problem),
      });
    } catch (error) {
      this.fail(answer, error);
    }
    this.running.delete(answer.id);
    if (!this.isRunning(current)) this.trees.delete(current.id);
    if (answer.state === 'stopped' || answer.state === 'broken') {
      await this.keep(current, { updated: Date.now() }, [answer]);
      await count(answer, bodyOf(answer, tree)); // the server may take its time for this
    }
    const { context } = this.model ?? {};
    if (context && answer.figures?.promptTokens) answer.figures.context = context;
    await this.keep(current, { updated: Date.now() }, [answer]);
  }

  /** Tell that an answer has more text, or why it has none yet. Keep the text now and then. */
  flow(answer, why = '') {
    this.dispatchEvent(new CustomEvent('text', { detail: { answer, why } }));
    const running = this.running.get(answer.id);
    const now = performance.now();
    if (now - (running.savedMs ?? 0) < SAVE_EVERY_MS) return;
    running.savedMs = now;
    this.put([], [answer]);
  }

  /** Keep what has come of the answers that are being written. */
  keepRunning() {
    const answers = [...this.trees.values()].flatMap((tree) =>
      [...this.running.keys()].map((id) => tree.get(id)).filter(Boolean),
    );
    if (answers.length) this.put([], answers);
  }

  fail(answer, error) {
    if (error.name === 'AbortError') {
      answer.state = 'stopped';
      return;
    }
    answer.state = answer.text ? 'broken' : 'failed';
    const { message, status = 0, code = null } = error;
    answer.error = { message, status, code };
    if (status === 0) this.tell('lost');
    if (!(error instanceof api.ServerError)) console.error(error);
  }

  /** Ask again without so many of the oldest messages that the rest fits into the context. */
  async shorten(answer) {
    const { current, tree } = this;
    const question = tree.get(answer.parent);
    const { length } = tree.upTo(question);
    for (let omitted = answer.omitted + 2; omitted < length; omitted += 2) {
      const body = bodyOf({ ...answer, omitted }, tree);
      const tokens = await api.countTokens({ messages: body.messages });
      const room = Math.min(body.max_tokens ?? Infinity, this.model.context / 4);
      if (tokens + room > this.model.context && omitted + 2 < length) continue;
      await this.answer(question, { omitted }, { current, tree });
      return;
    }
  }

  // ---- records ---------------------------------------------------------------------------------

  message(role, parent, text, { current, tree } = this) {
    const before = tree.children(parent).at(-1) ?? tree.get(parent);
    const created = Math.max(Date.now(), (before?.created ?? 0) + 1); // a clock may go back
    const conversation = current.id;
    return { id: newId(), conversation, parent, role, text, created, attachments: [] };
  }

  async add(conversation, tree, message) {
    tree.add(message);
    if (!this.list.includes(conversation)) this.list.push(conversation);
    conversation.chosen = choosing(tree, conversation.chosen, message);
    await this.keep(conversation, { updated: Date.now() }, [message]);
  }

  async keep(conversation, changes = {}, messages = []) {
    Object.assign(conversation, changes);
    this.tell('list');
    if (conversation === this.current) this.tell('change');
    await this.put([conversation], messages);
  }

  async put(conversations, messages) {
    try {
      await this.store.put({ conversations, messages });
      this.channel?.postMessage({ messages: structuredClone(messages) });
    } catch (error) {
      this.dispatchEvent(new CustomEvent('problem', { detail: error }));
    }
  }

  /** Another tab has written something. */
  async otherTab({ messages = [] }) {
    await this.load();
    const here = messages.filter(
      ({ conversation, id }) => conversation === this.current.id && !this.running.has(id),
    );
    here.forEach((message) =>
      this.tree.add({ ...message, elsewhere: message.state === 'running' }),
    );
    if (here.length) this.tell('change');
  }

  tell(event) {
    this.dispatchEvent(new Event(event));
  }
}

function titleOf(text) {
  const line = text.trim().split('\n')[0].replaceAll(/\s+/g, ' ');
  if (line.length <= TITLE_LENGTH) return line;
  return `${line.slice(0, TITLE_LENGTH).replace(/\s\S*$/, '')}…`;
}
