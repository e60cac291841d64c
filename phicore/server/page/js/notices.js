/* What the page tells: notices at the bottom, and words for screen readers. */

import { byId, h } from './dom.js';

const SHOWN_MS = 8000;
const UNDO_MS = 20000;

/** Show a notice for a while, with something that can be done about it. */
export function notify(text, { action, label = 'Undo', isError = false } = {}) {
  const end = () => notice.remove();
  const run = () => {
    end();
    action();
  };
  const notice = h(
    'div',
    { class: isError ? 'notice error' : 'notice', role: isError ? 'alert' : null },
    h('span', {}, text),
    action ? h('button', { type: 'button', onclick: run }, label) : null,
    h(
      'button',
      { type: 'button', class: 'quiet', 'aria-label': 'Close this notice', onclick: end },
      '×',
    ),
  );
  byId('notices').append(notice);
  let timer = setTimeout(end, action ? UNDO_MS : SHOWN_MS);
  for (const event of ['pointerenter', 'focusin'])
    notice.addEventListener(event, () => clearTimeout(timer));
  for (const event of ['pointerleave', 'focusout']) {
    notice.addEventListener(event, () => (timer = setTimeout(end, SHOWN_MS)));
  }
}

/** Say something to those who hear the page. A word at a time would be a torment: say sentences. */
export function say(text, { isNew = false } = {}) {
  const spoken = byId('spoken');
  if (isNew) spoken.replaceChildren();
  if (text.trim()) spoken.append(h('p', {}, text));
}
