/* What the page asks the server, and how it reads streams. Addresses are relative to the page. */

const KEY = 'phicore-key';

/** An answer of the server that tells an error, or none at all (status 0). */
export class ServerError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    this.name = 'ServerError';
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/** The key for the server. It is kept until this tab is closed. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? '',
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** Return whether the server is "ready", "loading", "stopping", "failed" or "absent". */
export async function health() {
  try {
    await ask('health');
    return 'ready';
  } catch (error) {
    if (error.code === 'model_loading') return 'loading';
    if (error.code === 'shutting_down') return 'stopping';
    return error.status ? 'failed' : 'absent';
  }
}

/** Return what the server tells about its model. */
export async function model() {
  const { data } = await (await ask('v1/models')).json();
  const [{ id, max_model_len: context = null, meta = {} }] = data;
  return { id, context, sampling: meta.sampling ?? {}, backend: meta.backend, device: meta.device };
}

/** Return the number of tokens of {messages} or {content}. */
export async function countTokens(body) {
  const { count } = await (await ask('tokenize', { body })).json();
  return count;
}

/**
 * Ask for an answer; yield the objects of its stream as they come.
 * @throws {ServerError} If the server refuses, tells an error later, or ends the stream early.
 */
export async function* chat(body, signal) {
  const stream_options = { include_usage: true };
  const options = { body: { ...body, stream: true, stream_options }, signal };
  const response = await ask('v1/chat/completions', options);
  for await (const data of events(response.body)) {
    if (data === '[DONE]') return;
    const found = JSON.parse(data);
    if (found.error) throw new ServerError(found.error.message, { status: 500, ...codeOf(found) });
    yield found;
  }
  throw new ServerError('The connection broke before the answer was complete.');
}

function codeOf({ error }) {
  return { code: error.code ?? error.type ?? null };
}

async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const options = { headers, signal, cache: 'no-store' };
  if (body !== undefined) {
    headers['Content-Type'] = 'application/json';
    Object.assign(options, { method: 'POST', body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ServerError('The server cannot be reached.');
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => ({}));
  const error = found.error ?? {};
  throw new ServerError(error.message ?? `The server answered with status ${response.status}.`, {
    status: response.status,
    code: error.code ?? null,
    retryAfter: Number(response.headers.get('Retry-After')) || null,
  });
}

/** Yield the data of the events in a stream of bytes (text/event-stream). */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = '';
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === 'AbortError') throw error;
        throw new ServerError('The connection broke before the answer was complete.');
      });
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split('\n');
      rest = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ''))) {
        if (line.startsWith('data:')) data.push(line.slice(5).replace(/^ /, ''));
        if (line !== '' || !data.length) continue;
        yield data.join('\n');
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
