/* One message: its text, what can be done with it, and what is told about it. */

import { advice } from './advice.js';
import { copy } from './copy.js';
import { byId, h, icon, iconButton } from './dom.js';
import { comparison, details, figures } from './figures.js';
import { MarkdownView } from './markdown.js';
import { notify, say } from './notices.js';

const LEISURE = 8; // after drawing, the page is free for this many times as long

/** Shows one message. */
export class MessageView {
  constructor(messages, message) {
    this.messages = messages;
    this.chat = messages.chat;
    this.message = message;
    this.isAnswer = message.role === 'assistant';
    this.text = h('div', { class: 'text' });
    this.note = h('div', { class: 'note', hidden: true });
    this.foot = h('div', { class: 'foot' });
    this.element = h(
      'article',
      {
        class: `message ${message.role}`,
        'data-id': message.id,
        'aria-label': this.isAnswer ? 'Answer' : 'You',
      },
      this.isAnswer ? null : this.attachments(),
      this.text,
      this.note,
      this.foot,
    );
    this.markdown = new MarkdownView(this.text, (words) => this.hear(words));
    this.isScheduled = false;
    this.isLive = false; // whether its words are spoken as they come
    this.isEditing = false;
    this.key = null;
  }

  get isRunning() {
    return this.chat.running.has(this.message.id);
  }

  attachments() {
    const { attachments = [] } = this.message;
    if (!attachments.length) return null;
    const shown = ({ name, text }) =>
      h(
        'details',
        { class: 'attachment' },
        h('summary', {}, icon('file'), name),
        h('pre', { tabindex: '0' }, text),
      );
    return h('div', { class: 'attachments' }, ...attachments.map(shown));
  }

  /** Show what the message is now. */
  update() {
    const { message } = this;
    const siblings = this.chat.tree.siblings(message);
    // What is shown depends on this alone, so an unchanged message is left as it is.
    const key = JSON.stringify([
      message.text.length,
      message.state,
      this.isRunning,
      message.figures,
      message.error,
      siblings.map(({ id, state }) => [id, state]),
      this.chat.current.sampling.seed,
    ]);
    if (this.key === key || this.isEditing) return;
    this.key = key;
    this.draw();
    if (!this.isRunning) this.wait('');
    if (!this.isRunning) this.isLive = false;
    this.element.classList.toggle('running', this.isRunning);
    this.element.setAttribute('aria-busy', String(this.isRunning));
    this.foot.replaceChildren(...this.footer(siblings));
    if (!this.isRunning) this.advise();
  }

  draw() {
    if (this.isAnswer) this.markdown.write(this.message.text, this.isRunning);
    else this.text.textContent = this.message.text;
  }

  /** Show text that has come, soon, but without filling the processor's time. */
  flow({ why }) {
    if (!this.isLive) say('', { isNew: true });
    this.isLive = true;
    this.wait(why);
    if (this.isScheduled) return;
    this.isScheduled = true;
    const draw = () => {
      const start = performance.now();
      this.isScheduled = false;
      if (this.isRunning) this.draw();
      this.messages.scroll();
      this.rest = LEISURE * (performance.now() - start);
    };
    setTimeout(() => (document.hidden ? draw() : requestAnimationFrame(draw)), this.rest ?? 0);
  }

  wait(why) {
    if ((this.why ?? '') === why) return;
    this.why = why;
    this.note.hidden = !why;
    this.note.className = 'note';
    this.note.replaceChildren(h('span', {}, why));
    if (why) say(why);
  }

  hear(words) {
    if (this.isLive) say(words);
  }

  footer(siblings) {
    const { message, chat } = this;
    const parts = [];
    if (siblings.length > 1) parts.push(this.branches(siblings));
    if (this.isRunning) return parts;
    parts.push(iconButton('copy', 'Copy', () => this.copy(), { class: 'icon-button act' }));
    if (this.isAnswer && message.parent !== null) {
      const pinned = chat.current.sampling.seed;
      const again = pinned === undefined ? 'Answer again' : `Answer again with seed ${pinned}`;
      parts.push(
        iconButton('again', again, () => chat.again(message), { class: 'icon-button act' }),
      );
      if (message.seed !== null && message.seed !== undefined) {
        const repeat = 'Repeat with the same seed and settings';
        parts.push(
          iconButton('repeat', repeat, () => chat.again(message, { repeats: true }), {
            class: 'icon-button act',
          }),
        );
      }
    }
    const label = this.isAnswer ? 'Edit this answer' : 'Edit and ask again';
    parts.push(iconButton('edit', label, () => this.edit(), { class: 'icon-button act' }));
    if (this.isAnswer) parts.push(...this.about(siblings));
    return parts;
  }

  about(siblings) {
    const { message } = this;
    if (message.edited)
      return [h('span', { class: 'line' }, h('span', { class: 'figures' }, 'edited by you'))];
    const pairs = details(message).flatMap(([name, value]) => [
      h('dt', {}, name),
      h('dd', {}, value),
    ]);
    const list = h('dl', { class: 'about', hidden: true }, ...pairs);
    const toggle = () => {
      list.hidden = !list.hidden;
      button.setAttribute('aria-expanded', String(!list.hidden));
    };
    const given = { type: 'button', class: 'quiet', 'aria-expanded': 'false', onclick: toggle };
    const button = h('button', given, 'Details');
    const shown = figures(message, () => this.messages.onseed(message.seed));
    const same = comparison(message, siblings);
    const badge =
      same &&
      h(
        'span',
        { class: same.isSame ? 'same' : 'same not' },
        icon(same.isSame ? 'check' : 'alert'),
        same.text,
      );
    return [
      button,
      h('div', { class: 'line' }, h('span', { class: 'figures' }, ...shown), badge),
      list,
    ];
  }

  branches(siblings) {
    const at = siblings.indexOf(this.message);
    const what = this.isAnswer ? 'answer' : 'version';
    const go = (to, name) => {
      this.chat.choose(siblings[to]); // shows it at once
      const other = this.messages.views.get(siblings[to].id)?.element;
      const buttons = [...(other?.querySelectorAll('.branches button:enabled') ?? [])];
      (buttons.find((each) => each.dataset.to === name) ?? buttons[0])?.focus();
    };
    const button = (name, label, to) =>
      iconButton(name, label, () => go(to, name), {
        class: 'icon-button',
        disabled: to < 0 || to >= siblings.length,
        'data-to': name,
      });
    return h(
      'span',
      { class: 'branches', role: 'group', 'aria-label': `${what} ${at + 1} of ${siblings.length}` },
      button('left', `Previous ${what}`, at - 1),
      h('span', { class: 'place', 'aria-hidden': 'true' }, `${at + 1}/${siblings.length}`),
      button('right', `Next ${what}`, at + 1),
    );
  }

  /** Tell what is wrong with the answer, and offer what can be done. */
  advise() {
    const { message, chat } = this;
    const found = this.isAnswer && !message.elsewhere && !message.edited ? advice(message) : null;
    const omitted = message.omitted ? `The ${message.omitted} oldest messages were left out. ` : '';
    this.note.hidden = !found && !omitted;
    this.note.className = message.error ? 'note error' : 'note';
    const offers = {
      again: ['Try again', () => chat.again(message)],
      repeat: ['Repeat with the same seed', () => chat.again(message, { repeats: true })],
      shorten: ['Leave out the oldest messages', () => this.shorten()],
      key: ['Enter a key', async () => (await this.messages.onkey()) && chat.again(message)],
    };
    const above = chat.tree.upTo(chat.tree.get(message.parent)).length - (message.omitted ?? 0);
    const isPossible = (name) => name !== 'shorten' || above > 2;
    const buttons = (found?.offers ?? []).filter(isPossible).map((name) => {
      const [label, onclick] = offers[name];
      return h('button', { type: 'button', onclick }, label);
    });
    this.note.replaceChildren(h('span', {}, omitted + (found?.text ?? '')), ...buttons);
  }

  async shorten() {
    try {
      await this.chat.shorten(this.message);
    } catch (error) {
      notify(error.message, { isError: true });
    }
  }

  async copy() {
    const isCopied = await copy(this.message.text);
    notify(isCopied ? 'Copied.' : 'The browser does not let this page copy.', {
      isError: !isCopied,
    });
  }

  edit() {
    if (this.isEditing || this.isRunning) return;
    this.isEditing = true;
    const field = h('textarea', {
      class: 'editor',
      'aria-label': 'Text of the message',
      rows: '3',
    });
    field.value = this.message.text;
    const end = () => {
      this.isEditing = false;
      this.key = null;
      editor.remove();
      this.text.hidden = this.foot.hidden = false;
      this.update();
    };
    const save = () => {
      const text = field.value.trim();
      if (!text) return;
      end();
      if (this.isAnswer) this.chat.editAnswer(this.message, text);
      else this.chat.edit(this.message, text);
      byId('text').focus();
    };
    const cancel = () => {
      end();
      this.foot.querySelector('[aria-label^=Edit]')?.focus();
    };
    const editor = h(
      'div',
      { class: 'editing' },
      field,
      h(
        'div',
        { class: 'buttons' },
        h(
          'button',
          { type: 'button', class: 'primary', onclick: save },
          this.isAnswer ? 'Keep' : 'Ask',
        ),
        h('button', { type: 'button', onclick: cancel }, 'Cancel'),
      ),
    );
    field.addEventListener('keydown', (event) => {
      if (event.key === 'Escape') {
        event.stopPropagation();
        cancel();
      } else if (event.key === 'Enter' && !event.shiftKey && !event.isComposing && !this.isAnswer) {
        event.preventDefault();
        save();
      }
    });
    this.text.hidden = this.foot.hidden = true;
    this.text.before(editor);
    field.focus();
  }
}
