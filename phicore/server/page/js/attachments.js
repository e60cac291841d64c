/* Text files that a message carries. They are put before the message, in blocks of code. */

const MOST_BYTES = 1024 * 1024;

/**
 * Read a file.
 * @returns {Promise<{name: string, text: string}>}
 * @throws {Error} If it is no text, or too large.
 */
export async function attachment(file) {
  if (file.size > MOST_BYTES) throw new Error(`${file.name} is larger than 1 MB.`);
  const bytes = await file.arrayBuffer();
  let text;
  try {
    text = new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch {
    throw new Error(`${file.name} is not a text in UTF-8.`);
  }
  if (text.includes('\0')) throw new Error(`${file.name} is not a text.`);
  return { name: file.name, text };
}

/** Return what the model reads for a message. */
export function contentOf({ text, attachments = [] }) {
  const blocks = attachments.map(({ name, text: content }) => {
    let fence = '```';
    for (const [marks] of content.matchAll(/`{3,}/g)) {
      if (marks.length >= fence.length) fence = `${marks}\``;
    }
    return `${name}:\n${fence}\n${content.replace(/\n$/, '')}\n${fence}`;
  });
  return [...blocks, text].filter(Boolean).join('\n\n');
}
