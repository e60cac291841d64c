/* The messages of the conversation that is shown. */

import { copy } from './copy.js';
import { byId, icon } from './dom.js';
import { MessageView } from './message.js';

const NEAR_PX = 80;

/** Shows the messages, and lets the user do something with them. */
export class Messages {
  constructor(chat, { onseed, onkey }) {
    this.chat = chat;
    this.onseed = onseed;
    this.onkey = onkey;
    this.views = new Map(); // by the id of the message
    this.element = byId('messages');
    this.scroller = byId('scroller');
    this.isFollowing = true;
    this.shown = null;
    chat.addEventListener('change', () => this.show());
    chat.addEventListener('text', ({ detail }) => this.views.get(detail.answer.id)?.flow(detail));
    this.scroller.addEventListener('scroll', () => this.look());
    new ResizeObserver(() => this.scroll()).observe(this.scroller);
    byId('to-end').append(icon('down'));
    byId('to-end').addEventListener('click', () => this.follow());
    this.element.addEventListener('click', ({ target }) => copyCode(target));
  }

  show() {
    const { chat } = this;
    const path = chat.path;
    const isOther = this.shown !== chat.current.id;
    if (isOther) this.views.clear();
    const views = path.map((message) => this.view(message));
    const elements = views.map((view) => view.element);
    const old = [...this.element.children];
    old.filter((each) => !elements.includes(each)).forEach((each) => each.remove());
    elements.forEach((each, i) => {
      if (this.element.children[i] !== each)
        this.element.insertBefore(each, this.element.children[i] ?? null);
    });
    views.forEach((view) => view.update());
    byId('empty').hidden = path.length > 0;
    if (isOther || path.at(-1)?.id !== this.last) this.isFollowing = true;
    this.shown = chat.current.id;
    this.last = path.at(-1)?.id;
    this.scroll();
  }

  view(message) {
    const found = this.views.get(message.id) ?? new MessageView(this, message);
    this.views.set(message.id, found);
    found.message = message;
    return found;
  }

  /** Edit the last question that is shown. */
  editLast() {
    const last = this.chat.path.findLast(({ role }) => role === 'user');
    if (last) this.views.get(last.id).edit();
  }

  look() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.isFollowing = scrollHeight - scrollTop - clientHeight < NEAR_PX;
    byId('to-end').hidden = this.isFollowing;
  }

  follow() {
    this.isFollowing = true;
    this.scroll();
  }

  scroll() {
    if (this.isFollowing) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.look();
  }
}

async function copyCode(target) {
  const button = target.closest('.copy-code');
  if (!button) return;
  const isCopied = await copy(button.closest('.code').querySelector('pre').textContent);
  button.textContent = isCopied ? 'Copied' : 'Not copied';
  setTimeout(() => (button.textContent = 'Copy'), 2000);
}
