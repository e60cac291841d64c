/* Asks the server for an answer, and fills the answer as it comes (see chat.js for its fields). */

import * as api from './api.js';
import { contentOf } from './attachments.js';

const MOST_TRIES = 5;

/** Return the body of the request for an answer. */
export function bodyOf(answer, tree) {
  const messages = answer.system ? [{ role: 'system', content: answer.system }] : [];
  const above = tree.upTo(tree.get(answer.parent)).slice(answer.omitted);
  for (const message of above) {
    const content = contentOf(message);
    if (!content) continue; // an answer that has failed
    const last = messages.at(-1);
    if (last?.role === message.role) last.content += `\n\n${content}`;
    else messages.push({ role: message.role, content });
  }
  return { messages, ...answer.sampling };
}

/**
 * Fill an answer with what the server sends.
 * @param {Object} answer The answer.
 * @param {Object} body The body of the request.
 * @param {AbortSignal} options.signal Ends the answer.
 * @param {function(string)} options.flow Called when there is more text, or when it has to be
 *   waited for; then with the reason.
 * @param {function(string): Promise<boolean>} options.needKey Called if the server wants a key;
 *   tells whether there is a new one.
 */
export async function fill(answer, body, { signal, flow, needKey }) {
  for (let tries = 1; ; tries++) {
    try {
      await read(answer, body, { signal, flow });
      return;
    } catch (error) {
      if (answer.text || tries > MOST_TRIES) throw error;
      if (error.status === 401) {
        if (!(await needKey(error.message))) throw error;
      } else if (error.code === 'model_loading') {
        tries = 0; // this may take long, but it ends
        flow('The model is loading. The answer begins when it is there.');
        await pause(1, signal);
      } else if (error.code === 'queue_full') {
        flow('The server answers others. This question waits.');
        await pause(error.retryAfter ?? 2, signal);
      } else throw error;
    }
  }
}

async function read(answer, body, { signal, flow }) {
  const start = performance.now();
  for await (const { choices, usage, ...about } of api.chat(body, signal)) {
    const s = (performance.now() - start) / 1000;
    const [choice] = choices;
    answer.model = about.model ?? null;
    answer.fingerprint = about.system_fingerprint ?? null;
    if (Number.isFinite(choice?.seed)) answer.seed = choice.seed;
    if (choice?.finish_reason) answer.finish = choice.finish_reason;
    if (choice?.delta?.content) {
      answer.figures = { firstS: answer.figures?.firstS ?? s, lastS: s };
      answer.text += choice.delta.content;
    }
    if (usage) answer.figures = { ...answer.figures, ...figuresOf(usage) };
    flow('');
  }
  answer.state = 'done';
}

function figuresOf({ prompt_tokens, completion_tokens, prompt_tokens_details, timings = {} }) {
  return {
    promptTokens: prompt_tokens,
    cachedTokens: prompt_tokens_details?.cached_tokens ?? 0,
    tokens: completion_tokens,
    tokensPerS: timings.predicted_per_second ?? 0,
  };
}

/** Count the tokens of an answer that has ended early, since the server did not tell them. */
export async function count(answer, { messages }) {
  const { firstS, lastS } = answer.figures ?? {};
  try {
    const promptTokens = await api.countTokens({ messages });
    const tokens = answer.text ? await api.countTokens({ content: answer.text }) : 0;
    const tokensPerS = tokens > 1 && lastS > firstS ? (tokens - 1) / (lastS - firstS) : 0;
    answer.figures = { ...answer.figures, promptTokens, tokens, tokensPerS };
  } catch {
    // The server may be gone.
  }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    const end = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    signal.addEventListener('abort', end, { once: true });
  });
}
