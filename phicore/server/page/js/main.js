/* Begins the page: makes its parts, and watches the server. */

import * as api from './api.js';
import { Chat } from './chat.js';
import { Composer } from './composer.js';
import { askKey, prepareDialogs } from './dialogs.js';
import { byId, icon } from './dom.js';
import { Messages } from './messages.js';
import { notify } from './notices.js';
import { defaults, SettingsPanel } from './settings.js';
import { Sidebar } from './sidebar.js';
import { openStore } from './store.js';
import { exported, imported, merged } from './transfer.js';

const BUSY_MS = 1500;
const CALM_MS = 15000;

let next; // when the server is looked at again
let hasAsked = false; // for a key, without being told to

const STATES = {
  ready: ['', ''],
  loading: ['Loading the model', 'The model is loading.'],
  stopping: ['Shutting down', 'The server is shutting down.'],
  failed: ['Failed', 'The model does not compute any more. The server’s log says why.'],
  absent: ['No server', 'The server cannot be reached. Is phicore serve still running?'],
};

const store = await openStore();
const chat = new Chat(store, defaults);
const settings = new SettingsPanel(chat);
const messages = new Messages(chat, { onseed: (seed) => settings.setSeed(seed), onkey: newKey });
const composer = new Composer(chat, messages);
const sidebar = new Sidebar(chat);

for (const element of document.querySelectorAll('[data-icon]'))
  element.prepend(icon(element.dataset.icon));
prepareDialogs();
prepareTheme();
prepareFiles();
prepareKeys();
byId('new').addEventListener('click', newConversation);
for (const each of document.querySelectorAll('#examples button')) {
  each.addEventListener('click', () => composer.fill(each.textContent));
}
chat.needKey = newKey;
chat.addEventListener('lost', watch);
addEventListener('pagehide', () => chat.keepRunning());
chat.addEventListener('problem', ({ detail }) => {
  notify(
    `The browser did not keep this: ${detail?.message ?? detail}. Export your conversations.`,
    { isError: true },
  );
});
chat.addEventListener('change', () => {
  const title = chat.current.title || 'New conversation';
  byId('title').textContent = title;
  document.title = `${title} · phicore`;
  // The address names the conversation, so that a reload shows it again.
  const place = chat.list.includes(chat.current)
    ? `#${chat.current.id}`
    : location.pathname + location.search;
  if (location.hash.slice(1) !== (place.startsWith('#') ? chat.current.id : ''))
    history.replaceState(null, '', place);
});
addEventListener('hashchange', () => chat.open(location.hash.slice(1)));
if (store.problem) {
  const text = 'Conversations are lost when this page is closed, since the browser keeps nothing';
  notify(`${text}: ${store.problem}.`, { isError: true });
}
byId('where').textContent = `Conversations are kept in this browser, for ${location.host}.`;
await chat.load();
await chat.open(location.hash.slice(1));
document.body.classList.add('ready');
if (!matchMedia('(pointer: coarse)').matches) byId('text').focus();
watch();

async function newConversation() {
  await chat.open(null);
  sidebar.toggle(false);
  byId('text').focus();
}

/** Ask for a key and read what the server tells with it. */
async function newKey(problem) {
  if (!(await askKey(problem))) return false;
  await readModel();
  return true;
}

/** Look after the server for as long as the page is open. */
async function watch() {
  clearTimeout(next);
  const state = await api.health();
  if (state === 'ready' && (!chat.model || document.body.dataset.server !== 'ready')) {
    await readModel(); // it may be another one since the server was last seen
  }
  const [label, text] = STATES[state];
  document.body.dataset.server = state;
  if (byId('state').textContent !== label) byId('state').textContent = label;
  byId('state').title = text;
  clearTimeout(next);
  next = setTimeout(watch, state === 'ready' && chat.model ? CALM_MS : BUSY_MS);
}

async function readModel() {
  try {
    chat.model = await api.model();
  } catch (error) {
    if (error.status !== 401 || hasAsked) return;
    hasAsked = true;
    await newKey(error.message);
    return;
  }
  byId('model').textContent = chat.model.id;
  byId('model').title = [chat.model.backend, chat.model.device].filter(Boolean).join(', ');
  chat.tell('change');
}

function prepareTheme() {
  const select = byId('theme');
  select.value = globalThis.theme.get();
  select.addEventListener('change', () => globalThis.theme.set(select.value));
}

function prepareFiles() {
  byId('export').addEventListener('click', async () => {
    const text = exported(await store.conversations(), await store.allMessages());
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([text], { type: 'application/json' }));
    link.download = `phicore-${new Date().toISOString().slice(0, 10)}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });
  byId('import').addEventListener('click', () => byId('import-file').click());
  byId('import-file').addEventListener('change', async ({ target }) => {
    const [file] = target.files;
    target.value = '';
    if (!file) return;
    try {
      const found = imported(await file.text());
      const here = {
        conversations: await store.conversations(),
        messages: await store.allMessages(),
      };
      const { changes, counts } = merged(found, here);
      await chat.take(changes);
      const { added, completed, same } = counts;
      const parts = [
        `${added} added`,
        completed ? `${completed} completed` : '',
        same ? `${same} here already` : '',
      ];
      notify(`Conversations: ${parts.filter(Boolean).join(', ')}.`);
    } catch (error) {
      notify(`Nothing was imported. ${error.message}`, { isError: true });
    }
  });
}

function prepareKeys() {
  addEventListener('keydown', (event) => {
    const isModal = document.querySelector('dialog[open]') !== null;
    const mod = event.ctrlKey || event.metaKey;
    if (isModal || event.isComposing) return;
    if (event.key === 'Escape' && chat.shownRunning) chat.stop();
    else if (mod && !event.shiftKey && event.key.toLowerCase() === 'k') sidebar.search();
    else if (mod && event.shiftKey && event.code === 'KeyO') newConversation();
    else if (mod && event.shiftKey && event.code === 'KeyS') settings.open();
    else if (mod && event.key === '/') byId('help').showModal();
    else if (event.key === 'Escape' && document.body.classList.contains('menu-open'))
      sidebar.toggle(false);
    else return;
    event.preventDefault();
  });
}
