/* Where messages are written: text, attachments, send and stop. */

import { attachment } from './attachments.js';
import { byId, h, icon, iconButton } from './dom.js';
import { share } from './figures.js';
import { notify } from './notices.js';

const DRAFT = 'phicore-draft-';

export class Composer {
  constructor(chat, messages) {
    this.chat = chat;
    this.messages = messages;
    this.field = byId('text');
    this.attachments = [];
    this.shown = null;
    byId('send').append(icon('send'));
    byId('stop').append(icon('stop'));
    byId('attach').append(icon('attach'));
    byId('composer').addEventListener('submit', (event) => {
      event.preventDefault();
      this.send();
    });
    byId('stop').addEventListener('click', () => chat.stop());
    byId('attach').addEventListener('click', () => byId('file').click());
    byId('file').addEventListener('change', ({ target }) => {
      this.attach(target.files);
      target.value = '';
    });
    this.field.addEventListener('keydown', (event) => this.key(event));
    this.field.addEventListener('input', () => this.typed());
    this.field.addEventListener('paste', (event) => {
      if (event.clipboardData?.files.length) {
        event.preventDefault();
        this.attach(event.clipboardData.files);
      }
    });
    this.takeDrops();
    chat.addEventListener('change', () => this.show());
  }

  show() {
    const { chat } = this;
    if (this.shown !== chat.current.id) {
      const wasNew = this.shown === null;
      this.shown = chat.current.id;
      this.attachments = [];
      this.field.value = sessionStorage.getItem(DRAFT + this.draftId) ?? '';
      this.showAttachments();
      this.grow();
      if (!wasNew && !matchMedia('(pointer: coarse)').matches) this.field.focus();
    }
    const isRunning = Boolean(chat.shownRunning);
    const hadFocus = document.activeElement === byId(isRunning ? 'send' : 'stop');
    byId('send').hidden = isRunning;
    byId('stop').hidden = !isRunning;
    if (hadFocus) this.field.focus();
    this.enable();
    this.showContext();
  }

  get draftId() {
    return this.chat.list.includes(this.chat.current) ? this.chat.current.id : 'new';
  }

  showContext() {
    const last = this.chat.path.findLast(({ figures }) => figures?.context);
    const meter = byId('context');
    meter.hidden = !last;
    if (!last) return;
    const { promptTokens, tokens, context } = last.figures;
    const used = (promptTokens + tokens) / context;
    byId('context-bar').value = used;
    byId('context-text').textContent = `Context ${share(used)}`;
    meter.classList.toggle('high', used > 0.85);
    meter.title = `${promptTokens + tokens} of ${context} tokens`;
  }

  typed() {
    sessionStorage.setItem(DRAFT + this.draftId, this.field.value);
    this.grow();
    this.enable();
  }

  enable() {
    byId('send').disabled = !this.field.value.trim() && !this.attachments.length;
  }

  /** Make the field as high as its text, within limits that the style sets. */
  grow() {
    this.field.style.height = 'auto';
    this.field.style.height = `${this.field.scrollHeight + 2}px`;
  }

  key(event) {
    if (event.isComposing) return;
    if (event.key === 'Enter' && !event.shiftKey && !event.altKey) {
      event.preventDefault();
      this.send();
    } else if (event.key === 'ArrowUp' && !this.field.value) {
      event.preventDefault();
      this.messages.editLast();
    }
  }

  send() {
    const text = this.field.value.trim();
    if ((!text && !this.attachments.length) || this.chat.shownRunning) return;
    const { attachments, draftId } = this;
    sessionStorage.removeItem(DRAFT + draftId);
    this.field.value = '';
    this.attachments = [];
    this.showAttachments();
    this.grow();
    this.messages.isFollowing = true;
    this.chat.send(text, attachments);
  }

  /** Put a text into the field. */
  fill(text) {
    this.field.value = text;
    this.typed();
    this.field.focus();
  }

  async attach(files) {
    for (const file of files) {
      try {
        this.attachments.push(await attachment(file));
      } catch (error) {
        notify(error.message, { isError: true });
      }
    }
    this.showAttachments();
    this.enable();
    this.field.focus();
  }

  showAttachments() {
    const chip = (each) =>
      h(
        'li',
        {},
        icon('file'),
        h('span', {}, each.name),
        iconButton('close', `Remove ${each.name}`, () => {
          this.attachments = this.attachments.filter((other) => other !== each);
          this.showAttachments();
          this.enable();
          this.field.focus();
        }),
      );
    byId('chips').replaceChildren(...this.attachments.map(chip));
    byId('chips').hidden = !this.attachments.length;
  }

  takeDrops() {
    const has = (event) => [...(event.dataTransfer?.types ?? [])].includes('Files');
    const body = document.body;
    let depth = 0;
    const mark = (change) => {
      depth = Math.max(0, depth + change);
      body.classList.toggle('dropping', depth > 0);
    };
    body.addEventListener('dragenter', (event) => has(event) && mark(1));
    body.addEventListener('dragleave', (event) => has(event) && mark(-1));
    body.addEventListener('dragover', (event) => has(event) && event.preventDefault());
    body.addEventListener('drop', (event) => {
      if (!has(event)) return;
      event.preventDefault();
      mark(-depth);
      this.attach(event.dataTransfer.files);
    });
  }
}
