/* The list of conversations: search, rename, delete. */

import { byId, h, iconButton } from './dom.js';
import { notify } from './notices.js';
import { found } from './search.js';

const DAY_MS = 86400000;
const WAIT_MS = 120;

export class Sidebar {
  constructor(chat) {
    this.chat = chat;
    this.field = byId('search');
    this.list = byId('conversations');
    this.renaming = null;
    this.isPressed = false; // a click on a row that is replaced meanwhile would be lost
    for (const event of ['list', 'change']) chat.addEventListener(event, () => this.show());
    this.field.addEventListener('input', () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.show(), WAIT_MS);
    });
    byId('sidebar').addEventListener('keydown', (event) => this.key(event));
    this.list.addEventListener('pointerdown', ({ button }) => (this.isPressed = button === 0));
    for (const event of ['pointerup', 'pointercancel'])
      addEventListener(event, () => setTimeout(() => this.released())); // after the click
    byId('menu').addEventListener('click', () => this.toggle(true));
    byId('backdrop').addEventListener('click', () => this.toggle(false));
    this.narrow = matchMedia('(max-width: 48rem)');
    this.narrow.addEventListener('change', () => this.toggle(false));
    this.toggle(false);
  }

  /** Open or close the list where it covers the page (on phones). */
  toggle(isOpen) {
    const isNarrow = this.narrow.matches;
    const wasOpen = document.body.classList.contains('menu-open');
    document.body.classList.toggle('menu-open', isOpen && isNarrow);
    byId('sidebar').inert = isNarrow && !isOpen;
    byId('main').inert = isNarrow && isOpen;
    byId('menu').setAttribute('aria-expanded', String(isOpen && isNarrow));
    if (isNarrow && isOpen) byId('new').focus();
    else if (wasOpen) byId('menu').focus();
  }

  search() {
    this.toggle(true);
    this.field.focus();
    this.field.select();
  }

  released() {
    if (!this.isPressed) return;
    this.isPressed = false;
    this.show();
  }

  async show() {
    if (this.renaming || this.isPressed) return;
    const turn = (this.turn = {});
    const query = this.field.value.trim();
    const results = await found(this.chat, query);
    if (turn !== this.turn || this.renaming || this.isPressed) return; // a newer call has begun
    const focused = document.activeElement?.closest('#conversations [data-id]')?.dataset.id;
    const groups = new Map();
    for (const result of results) {
      const name = query ? 'Found' : groupOf(result.conversation.updated);
      groups.set(name, [...(groups.get(name) ?? []), this.row(result)]);
    }
    this.list.replaceChildren(
      ...[...groups].map(([name, rows], i) =>
        h(
          'section',
          {},
          h('h2', { id: `group-${i}` }, name),
          h('ul', { 'aria-labelledby': `group-${i}` }, ...rows),
        ),
      ),
    );
    if (!results.length) {
      this.list.append(
        h('p', { class: 'nothing' }, query ? 'Nothing is found.' : 'No conversations yet.'),
      );
    }
    byId('found').textContent = query ? `${results.length} found` : '';
    if (focused) this.list.querySelector(`[data-id="${focused}"] .title`)?.focus();
  }

  row({ conversation, snippet }) {
    const { chat } = this;
    const isCurrent = conversation === chat.current;
    const title = conversation.title || 'Untitled';
    const open = async () => {
      await chat.open(conversation.id);
      this.toggle(false);
    };
    const name = h(
      'button',
      {
        type: 'button',
        class: 'title',
        onclick: open,
        title,
        'aria-current': isCurrent ? 'page' : null,
      },
      h('span', { class: 'name' }, title),
      chat.isRunning(conversation)
        ? h('span', { class: 'busy', role: 'img', 'aria-label': 'writing' })
        : null,
      snippet
        ? h('span', { class: 'snippet' }, snippet[0], h('mark', {}, snippet[1]), snippet[2])
        : null,
    );
    const row = h(
      'li',
      { 'data-id': conversation.id, class: isCurrent ? 'current' : null },
      name,
      iconButton('edit', `Rename ${title}`, () => this.rename(row, conversation)),
      iconButton('trash', `Delete ${title}`, () => this.remove(conversation)),
    );
    return row;
  }

  rename(row, conversation) {
    const field = h('input', { class: 'rename', 'aria-label': 'Title', maxlength: '200' });
    field.value = conversation.title;
    const end = async (isKept) => {
      if (this.renaming !== field) return;
      this.renaming = null;
      const title = field.value.trim();
      if (isKept && title) await this.chat.update(conversation, { title });
      await this.show();
      this.list.querySelector(`[data-id="${conversation.id}"] .title`)?.focus();
    };
    field.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' && event.key !== 'Escape') return;
      event.stopPropagation();
      if (!event.isComposing) end(event.key === 'Enter');
    });
    field.addEventListener('blur', () => end(true));
    this.renaming = field;
    row.replaceChildren(field);
    field.focus();
    field.select();
  }

  async remove(conversation) {
    const titles = [...this.list.querySelectorAll('.title')];
    const at = titles.indexOf(this.list.querySelector(`[data-id="${conversation.id}"] .title`));
    const next = (titles[at + 1] ?? titles[at - 1])?.closest('[data-id]').dataset.id;
    const isCurrent = conversation === this.chat.current;
    await this.chat.remove(conversation);
    await this.show();
    if (!isCurrent) this.list.querySelector(`[data-id="${next}"] .title`)?.focus();
    const action = async () => {
      await this.chat.restore(conversation);
      await this.chat.open(conversation.id);
    };
    notify(`“${conversation.title || 'Untitled'}” is deleted.`, { action });
  }

  /** Arrow keys go through the list; Enter in the search opens what is found first. */
  key(event) {
    const titles = [...this.list.querySelectorAll('.title')];
    const at = titles.indexOf(document.activeElement);
    if (event.key === 'Escape') {
      if (this.field.value) {
        this.field.value = '';
        this.show();
      } else this.toggle(false);
      event.stopPropagation();
      return;
    }
    if (event.key === 'Enter' && event.target === this.field) titles[0]?.click();
    const isHere = at >= 0 || event.target === this.field;
    if (!isHere || !['ArrowDown', 'ArrowUp'].includes(event.key)) return;
    event.preventDefault();
    const to = at + (event.key === 'ArrowDown' ? 1 : -1);
    (to < 0 ? this.field : titles[Math.min(to, titles.length - 1)])?.focus();
  }
}

function groupOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return 'Today';
  if (time >= midnight - DAY_MS) return 'Yesterday';
  return time >= midnight - 7 * DAY_MS ? 'Last seven days' : 'Earlier';
}
