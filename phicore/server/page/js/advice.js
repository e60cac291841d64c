/* What can be done about an answer that has not come, or not as a whole. */

/**
 * Return what to tell, and what to offer.
 * @returns {{text: string, offers: Array<string>}} Offers: "again", "repeat", "shorten", "key".
 */
export function advice(answer) {
  const { state, error } = answer;
  if (state === 'stopped') return { text: 'You have stopped this answer.', offers: [] };
  if (state === 'running') return { text: 'Another tab writes this answer, or was closed.', offers: ['again'] };
  if (state === 'broken') {
    const why = error?.message ?? 'The page was closed before the answer was complete.';
    return {
      text: `${why} What had come is kept. ${answer.seed === null ? '' : 'With the same seed you get this text again, and its rest.'}`,
      offers: answer.seed === null ? ['again'] : ['repeat'],
    };
  }
  if (state === 'failed') return failed(error ?? { message: 'No answer came.' });
  if (answer.finish === 'length' && answer.sampling?.max_tokens === answer.figures?.tokens) {
    return { text: 'The answer has reached the limit that is set (Max tokens).', offers: [] };
  }
  if (answer.finish === 'length') {
    return { text: 'The answer ended here because the context, or the server’s limit, is full.', offers: ['shorten'] };
  }
  return null;
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
  if (code === 'queue_full') return { text: 'The server has too much to do. Try again in a while.', offers: ['again'] };
  if (code === 'shutting_down') return { text: 'The server is shutting down. Start it again.', offers: ['again'] };
  if (status === 413) return { text: `${message}. Leave out attachments.`, offers: [] };
  const hint = status === 400 ? ' Look at the settings.' : '';
  return { text: `${message}${/[.!?]$/.test(message) ? '' : '.'}${hint}`, offers: ['again'] };
}
