/* Dialogs: the key for the server, and help. */

import * as api from './api.js';
import { byId } from './dom.js';

let asking = null;

/** Ask for the server's API key; return whether there is a new one. */
export function askKey(problem = '') {
  asking ??= new Promise((resolve) => {
    const dialog = byId('key');
    const field = byId('key-field');
    byId('key-problem').textContent = problem
      ? `${problem[0].toUpperCase()}${problem.slice(1)}.`
      : '';
    field.value = '';
    dialog.returnValue = '';
    dialog.addEventListener(
      'close',
      () => {
        asking = null;
        const isGiven = dialog.returnValue === 'use' && field.value.trim() !== '';
        if (isGiven) api.key.set(field.value.trim());
        field.value = '';
        resolve(isGiven);
      },
      { once: true },
    );
    dialog.showModal();
    field.focus();
  });
  return asking;
}

/** Let the buttons with `data-close` close their dialogs. */
export function prepareDialogs() {
  for (const button of document.querySelectorAll('[data-close]')) {
    button.addEventListener('click', () => button.closest('dialog').close());
  }
  byId('open-help').addEventListener('click', () => byId('help').showModal());
  for (const each of document.querySelectorAll('.mod')) {
    if (/Mac|iPhone|iPad/.test(navigator.platform)) each.textContent = '⌘';
  }
}
