/* What can be done about an answer that has not come, or not as a whole. */

/**
 * Return what to tell, and what to offer.
 * @returns {{text: string, offers: Array<string>}} Offers: "again", "repeat", "shorten", "key".
 */
export function advice(answer) {
  const { state, error } = answer;
  if (state === 'stopped') return { text: 'You have stopped this answer.', offers: [] };
  if (state === 'running') {
    return { text: 'Another tab writes this answer, or was closed.', offers: ['again'] };
  }
  if (state === 'broken') return broken(answer);
  if (state === 'failed') return failed(error ?? { message: 'No answer came.' });
  if (answer.finish === 'length') return full(answer);
  return null;
}

function full({ sampling = {}, figures }) {
  const { promptTokens = 0, tokens = 0, context = 0 } = figures ?? {};
  if (context && promptTokens + tokens >= context - 1) {
    return { text: 'The context is full, so the answer ended here.', offers: ['shorten'] };
  }
  if (sampling.max_tokens === tokens) {
    return { text: 'The answer has reached the limit that is set (Max tokens).', offers: [] };
  }
  return { text: 'The answer has reached the server’s limit of tokens.', offers: [] };
}

function broken({ error, seed }) {
  const why = error?.message ?? 'The page was closed before the answer was complete.';
  const text = `${why} What had come is kept.`;
  if (seed === null) return { text, offers: ['again'] };
  const hope = 'With the same seed you get this text again, and its rest.';
  return { text: `${text} ${hope}`, offers: ['repeat'] };
}

function failed({ message, status, code }) {
  if (code === 'context_length_exceeded') {
    return {
      text: `${message} Edit your message, or leave out the oldest messages.`,
      offers: ['shorten'],
    };
  }
  if (status === 401) return { text: `${message}.`, offers: ['key'] };
  if (status === 0) {
    const where = location.origin === 'null' ? '' : ` at ${location.origin}`;
    return {
      text: `${message} Is phicore serve still running${where}?`,
      offers: ['again'],
    };
  }
  if (code === 'queue_full') {
    return { text: 'The server has too much to do. Try again in a while.', offers: ['again'] };
  }
  if (code === 'shutting_down') {
    return { text: 'The server is shutting down. Start it again.', offers: ['again'] };
  }
  if (status === 413) return { text: `${message}. Leave out attachments.`, offers: [] };
  const hint = status === 400 ? ' Look at the settings.' : '';
  return { text: `${message}${/[.!?]$/.test(message) ? '' : '.'}${hint}`, offers: ['again'] };
}
