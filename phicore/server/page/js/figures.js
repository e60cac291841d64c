/* The line of figures below an answer, and whether the same seed gave the same text. */

import { h } from './dom.js';

const whole = new Intl.NumberFormat('en');

/** Return the parts of the line: texts, and the button with the seed. */
export function figures(answer, onseed) {
  const { firstS, tokensPerS, promptTokens, tokens, context } = answer.figures ?? {};
  const parts = [];
  const part = (text, title) => parts.push(h('span', { title }, text));
  if (tokensPerS) part(`${tokensPerS.toFixed(1)} tokens/s`, 'Speed of the answer');
  if (firstS !== undefined)
    part(`first token ${seconds(firstS)}`, 'From sending to the first token');
  if (tokens !== undefined)
    part(`${whole.format(tokens)} ${tokens === 1 ? 'token' : 'tokens'}`, 'Length of the answer');
  if (context && promptTokens !== undefined) {
    const used = promptTokens + tokens;
    const title = `The conversation takes ${whole.format(used)} of ${whole.format(context)} tokens`;
    part(`context ${share(used / context)}`, title);
  }
  if (answer.seed !== null && answer.seed !== undefined) {
    const title = 'Use this seed for the next answers';
    parts.push(
      h('button', { type: 'button', class: 'seed', title, onclick: onseed }, `seed ${answer.seed}`),
    );
  }
  return parts;
}

/** Return pairs of a name and a text that tell all about an answer. */
export function details(answer) {
  const { promptTokens, cachedTokens } = answer.figures ?? {};
  const settings = Object.entries(answer.sampling ?? {}).filter(([name]) => name !== 'seed');
  return [
    ['Model', answer.model],
    [
      'Prompt',
      promptTokens === undefined
        ? null
        : `${whole.format(promptTokens)} tokens` +
          (cachedTokens ? `, ${whole.format(cachedTokens)} of them remembered` : ''),
    ],
    [
      'Settings',
      settings.map(([name, value]) => `${name} ${value}`).join(', ') || 'the model’s own',
    ],
    ['System message', answer.system || 'none'],
    ['Ended', ENDS[answer.finish] ?? STATES[answer.state] ?? null],
    ['Fingerprint', answer.fingerprint],
  ].filter(([, value]) => value);
}

const ENDS = { stop: 'by the model', length: 'at the limit of tokens' };
const STATES = { stopped: 'by you', broken: 'too early', failed: 'with an error' };

/**
 * Compare an answer with those beside it that were made with the same seed and settings.
 * @returns {?{isSame: boolean, text: string}}
 */
export function comparison(answer, siblings) {
  if (answer.seed === null || answer.seed === undefined || answer.state === 'running') return null;
  const at = siblings.findIndex((other) => other !== answer && isMadeAlike(answer, other));
  if (at < 0) return null;
  const other = siblings[at];
  const isSame =
    isWhole(answer) && isWhole(other)
      ? answer.text === other.text
      : answer.text.startsWith(other.text) || other.text.startsWith(answer.text);
  const what =
    isWhole(answer) && isWhole(other) ? 'the same text' : 'the same text as far as it goes';
  if (isSame) return { isSame, text: `same seed, ${what} as ${at + 1}/${siblings.length}` };
  const isOther = answer.fingerprint !== other.fingerprint;
  const why = isOther ? ', since the model or the program has changed' : '';
  return { isSame, text: `same seed, but not the text of ${at + 1}/${siblings.length}${why}` };
}

function isWhole({ state }) {
  return state === 'done';
}

function isMadeAlike(answer, other) {
  const settings = ({ sampling = {}, system, omitted }) => {
    const { seed, ...rest } = sampling;
    return JSON.stringify([Object.entries(rest).sort(), system, omitted]);
  };
  return other.seed === answer.seed && other.text && settings(answer) === settings(other);
}

export function share(part) {
  return `${part < 0.1 ? (100 * part).toFixed(1) : Math.round(100 * part)} %`;
}

function seconds(s) {
  return s < 1 ? `${Math.round(1000 * s)} ms` : `${s.toFixed(1)} s`;
}
