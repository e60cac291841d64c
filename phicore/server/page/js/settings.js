/* The settings of a conversation: the system message, the sampler and the seed. */

import { byId, h, iconButton } from './dom.js';
import { notify } from './notices.js';

const DEFAULTS = 'phicore-defaults';

/** The numbers: field of the request, name, bounds, step, name of the model's own value, help. */
const NUMBERS = [
  [
    'temperature',
    'Temperature',
    0,
    5,
    0.05,
    'temperature',
    'How random the answers are. 0 always takes the likeliest token.',
  ],
  [
    'top_p',
    'Top p',
    0,
    1,
    0.01,
    'top_p',
    'Keep the smallest set of tokens whose probabilities reach this. 1 keeps all.',
  ],
  [
    'top_k',
    'Top k',
    0,
    1000000,
    1,
    'top_k',
    'Keep this many of the likeliest tokens. 0 keeps all.',
  ],
  [
    'min_p',
    'Min p',
    0,
    1,
    0.01,
    'min_p',
    'Drop tokens less likely than this fraction of the best one.',
  ],
  [
    'repetition_penalty',
    'Repeat penalty',
    0.01,
    10,
    0.01,
    'repeat_penalty',
    'Above 1, tokens that have just been used become less likely.',
  ],
  ['max_tokens', 'Max tokens', 1, 10000000, 1, null, 'The longest answer, in tokens.'],
  [
    'seed',
    'Seed',
    0,
    Number.MAX_SAFE_INTEGER,
    1,
    null,
    'The same seed gives the same text. Without one, each answer gets its own.',
  ],
];

/** Return what new conversations begin with. */
export function defaults() {
  try {
    const { system = '', sampling = {} } = JSON.parse(localStorage.getItem(DEFAULTS)) ?? {};
    return { system: String(system), sampling };
  } catch {
    return { system: '', sampling: {} };
  }
}

export class SettingsPanel {
  constructor(chat) {
    this.chat = chat;
    this.dialog = byId('settings');
    this.inputs = new Map();
    this.system = byId('system');
    byId('numbers').append(...NUMBERS.map((each) => this.field(...each)));
    this.dialog.addEventListener('input', () => this.keep());
    byId('open-settings').addEventListener('click', () => this.open());
    byId('save-defaults').addEventListener('click', () => this.saveDefaults());
    byId('reset-settings').addEventListener('click', () => this.reset());
    this.dialog.addEventListener('click', (event) => {
      if (event.target === this.dialog) this.dialog.close(); // beside the panel
    });
    chat.addEventListener('change', () => this.mark());
  }

  field(name, label, min, max, step, own, help) {
    const input = h('input', {
      type: 'number',
      id: `set-${name}`,
      min,
      max,
      step: 'any',
      inputmode: 'decimal',
      autocomplete: 'off',
      'aria-describedby': `help-${name}`,
    });
    if (step === 1) input.step = '1';
    this.inputs.set(name, { input, own });
    const clear = iconButton('close', `Clear ${label}`, () => {
      input.value = '';
      this.keep();
      input.focus();
    });
    return h(
      'div',
      { class: 'field' },
      h('label', { for: input.id }, label),
      h('div', { class: 'number' }, input, clear),
      h('p', { class: 'help', id: `help-${name}` }, help),
    );
  }

  open() {
    this.show();
    this.dialog.showModal();
  }

  show() {
    const { system, sampling } = this.chat.current;
    this.system.value = system;
    const model = this.chat.model?.sampling ?? {};
    for (const [name, { input, own }] of this.inputs) {
      input.value = sampling[name] ?? '';
      input.placeholder = own && own in model ? `${model[own]}` : (PLACEHOLDERS[name] ?? '');
    }
  }

  /** Return the settings in the fields; those that are wrong are marked and left out. */
  read() {
    const sampling = {};
    for (const [name, { input }] of this.inputs) {
      const isGood = input.checkValidity();
      input.setAttribute('aria-invalid', String(!isGood));
      if (isGood && input.value !== '') sampling[name] = input.valueAsNumber;
    }
    return { system: this.system.value.trim(), sampling };
  }

  keep() {
    return this.chat.update(this.chat.current, this.read());
  }

  /** Use a seed from now on. */
  async setSeed(seed) {
    const { current } = this.chat;
    await this.chat.update(current, { sampling: { ...current.sampling, seed } });
    notify(`The next answers use the seed ${seed}.`, {
      label: 'Use random seeds',
      action: () => this.clearSeed(),
    });
  }

  async clearSeed() {
    const { current } = this.chat;
    const { seed, ...sampling } = current.sampling;
    await this.chat.update(current, { sampling });
  }

  saveDefaults() {
    localStorage.setItem(DEFAULTS, JSON.stringify(this.read()));
    notify('New conversations begin with these settings.');
  }

  async reset() {
    await this.chat.update(this.chat.current, { system: '', sampling: {} });
    this.show();
  }

  /** Show beside the button what differs from the model's own settings. */
  mark() {
    const { system, sampling } = this.chat.current;
    const count = Object.keys(sampling).length + (system ? 1 : 0);
    byId('settings-count').textContent = count || '';
    byId('open-settings').setAttribute(
      'aria-label',
      count ? `Settings, ${count} changed` : 'Settings',
    );
    const pinned = byId('pinned');
    pinned.hidden = sampling.seed === undefined;
    if (pinned.hidden) return;
    const remove = iconButton('close', 'Use random seeds again', () => this.clearSeed());
    pinned.replaceChildren(`Seed ${sampling.seed}`, remove);
  }
}

const PLACEHOLDERS = { max_tokens: 'no limit', seed: 'random' };
