/*
 * Markdown as models write it: paragraphs, headings, lists, quotes, tables, code. HTML is text.
 *
 * A text is read once: blocks that cannot change any more are settled, and only the last one is
 * read again when more text comes. What is shown at the end does not depend on the parts in which
 * the text came.
 */

import { patch } from './dom.js';
import { inline, node } from './inline.js';

const FENCE = /^(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^(#{1,6})(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*)|$)/;
const DELIMITERS = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const DEEPEST = 12;

/** Shows a Markdown text that may grow. */
export class MarkdownView {
  /**
   * @param {Element} element What shows the text; it must be empty.
   * @param {function(string)} settled Called with the words of each block that is complete.
   */
  constructor(element, settled = () => {}) {
    this.element = element;
    this.settled = settled;
    this.reset();
  }

  reset() {
    this.element.replaceChildren();
    this.text = '';
    this.offset = 0; // of the first character that is not settled
    this.count = 0; // of settled blocks
    this.nodes = []; // of the blocks that are not settled
  }

  /**
   * Show a text.
   * @param {string} text The whole text.
   * @param {boolean} isOpen Whether more of it will come.
   */
  write(text, isOpen = false) {
    if (!text.startsWith(this.text)) this.reset();
    this.text = text;
    const lines = text.slice(this.offset).split('\n');
    const blocks = parse(lines, isOpen);
    const nodes = blocks.map((block) => block.node);
    patch(this.element, this.nodes, nodes, this.count);
    // A block is settled once the next one has begun with a whole line.
    let count = 0;
    while (count + 1 < blocks.length && blocks[count + 1].start < lines.length - 1) count++;
    for (let i = 0; i < (isOpen ? count : blocks.length); i++) {
      this.settled(this.element.childNodes[this.count + i].textContent);
    }
    const settledLines = count ? blocks[count].start : 0;
    for (let i = 0; i < settledLines; i++) this.offset += lines[i].length + 1;
    this.count += count;
    this.nodes = nodes.slice(count);
  }
}

/**
 * Read lines into blocks.
 * @returns {Array<{node: Object, start: number, end: number}>} Blocks with the index of their
 *   first line and that after their last one.
 */
export function parse(lines, isOpen = false, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at++;
      continue;
    }
    const [made, end] = block(lines, at, isOpen, depth);
    if (made !== null) blocks.push({ node: made, start: at, end });
    at = end;
  }
  return blocks;
}

function block(lines, at, isOpen, depth) {
  const line = lines[at].trim();
  if (indentOf(lines[at]) < 4 || depth > 0) {
    const fence = FENCE.exec(line);
    if (fence !== null) return code(lines, at, fence, isOpen);
    const heading = HEADING.exec(line);
    if (heading !== null) {
      const tag = `h${Math.min(6, heading[1].length + 2)}`;
      return [node(tag, inline(heading[2] ?? '', isOpen && at === lines.length - 1)), at + 1];
    }
    if (RULE.test(line)) return [node('hr'), at + 1];
    if (depth < DEEPEST) {
      if (line.startsWith('>')) return quote(lines, at, isOpen, depth);
      if (ITEM.test(line)) return list(lines, at, isOpen, depth);
    }
    if (isTable(lines, at)) return table(lines, at, isOpen);
  }
  return paragraph(lines, at, isOpen);
}

function isBlank(line) {
  return line.trim() === '';
}

/** Return the number of columns before the text of a line. */
function indentOf(line) {
  let columns = 0;
  for (const character of line) {
    if (character === ' ') columns++;
    else if (character === '\t') columns += 4 - (columns % 4);
    else break;
  }
  return columns;
}

/** Return a line without up to so many columns of space at its beginning. */
function outdent(line, columns) {
  let at = 0;
  let gone = 0;
  while (gone < columns && (line[at] === ' ' || line[at] === '\t')) {
    gone += line[at++] === ' ' ? 1 : 4 - (gone % 4);
  }
  return ' '.repeat(Math.max(0, gone - columns)) + line.slice(at);
}

function code(lines, at, [, marks, language], isOpen) {
  const indent = indentOf(lines[at]);
  const closes = (line) =>
    line.startsWith(marks[0]) && line.length >= marks.length && !line.replaceAll(marks[0], '');
  let end = at + 1;
  while (end < lines.length && !closes(lines[end].trim())) end++;
  const content = lines.slice(at + 1, end).map((line) => outdent(line.replace(/\r$/, ''), indent));
  if (end === lines.length) {
    // The last line may become the end of the code.
    const last = content.at(-1)?.trim();
    if (last !== undefined && isOpen && !last.replaceAll(marks[0], '')) content.pop();
    if (content.at(-1) === '') content.pop();
  }
  const name = language.trim().split(/\s/)[0].slice(0, 40);
  const label = name ? `Code, ${name}` : 'Code';
  const head = node(
    'div',
    [
      node('span', name ? [name] : []),
      node('button', ['Copy'], { type: 'button', class: 'copy-code' }),
    ],
    { class: 'code-head' },
  );
  const text = content.length ? [content.join('\n') + '\n'] : [];
  const shown = node('pre', [node('code', text)], {
    tabindex: '0',
    'aria-label': label,
    role: 'group',
  });
  return [node('div', [head, shown], { class: 'code' }), Math.min(end + 1, lines.length)];
}

function quote(lines, at, isOpen, depth) {
  let end = at;
  const inside = [];
  while (end < lines.length && lines[end].trimStart().startsWith('>')) {
    inside.push(lines[end++].trimStart().replace(/^> ?/, ''));
  }
  const children = parse(inside, isOpen && end === lines.length, depth + 1);
  return [
    node(
      'blockquote',
      children.map((block) => block.node),
    ),
    end,
  ];
}

/** Return what a line is as the beginning of a list's item, null if it is none. */
function itemOf(line) {
  const found = RULE.test(line.trim()) ? null : ITEM.exec(line.trimStart().trimEnd());
  if (found === null) return null;
  const [, marker, space = ' ', text = ''] = found;
  const indent = indentOf(line);
  const width = marker.length + (space.length > 4 ? 1 : space.length);
  const kind = /\d/.test(marker) ? marker.at(-1) : marker;
  return { indent, kind, text, content: indent + width, number: parseInt(marker, 10) };
}

function list(lines, at, isOpen, depth) {
  const first = itemOf(lines[at]);
  const items = [];
  let isLoose = false;
  let end = at;
  while (end < lines.length) {
    const item = itemOf(lines[end]);
    if (item === null || item.kind !== first.kind || item.indent >= first.indent + 2) break;
    const [inside, next, wasBlank] = itemLines(lines, end, item);
    const following = next < lines.length ? itemOf(lines[next]) : null;
    const goesOn = following?.kind === first.kind && following.indent < first.indent + 2;
    items.push([inside, next]);
    isLoose ||= wasBlank && goesOn;
    end = next;
    if (!goesOn) break;
  }
  const children = items.map(([inside, next]) => {
    const blocks = parse(inside, isOpen && next === lines.length, depth + 1);
    const apart = blocks.some((block, i) => i > 0 && block.start > blocks[i - 1].end);
    return [blocks.map((block) => block.node), apart];
  });
  isLoose ||= children.some(([, apart]) => apart);
  const shown = children.map(([nodes]) => node('li', isLoose ? nodes : nodes.flatMap(tight)));
  if (Number.isNaN(first.number)) return [node('ul', shown), end];
  const attributes = first.number === 1 ? {} : { start: String(first.number) };
  return [node('ol', shown, attributes), end];
}

/** Return the lines of an item, the index after them, and whether blank lines follow. */
function itemLines(lines, at, item) {
  const inside = [item.text];
  let blanks = 0;
  let isCode = FENCE.test(item.text);
  let end = at + 1;
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (isBlank(line)) {
      blanks++;
      continue;
    }
    const isInside = indentOf(line) >= item.indent + 2;
    const isEnd = blanks > 0 || isCode || interrupts(lines, end) || itemOf(line) !== null;
    if (!isInside && isEnd) break;
    for (; blanks > 0; blanks--) inside.push('');
    inside.push(outdent(line, item.content));
    if (FENCE.test(line.trim())) isCode = !isCode;
  }
  return [inside, end, blanks > 0];
}

/** Return what a block shows in a tight list: a paragraph's content stands without it. */
function tight(block, index) {
  if (block.tag !== 'p') return [block];
  return index === 0 ? block.children : [node('br'), ...block.children];
}

function isTable(lines, at) {
  const next = lines[at + 1];
  if (next === undefined || !lines[at].includes('|') || !DELIMITERS.test(next.trim())) return false;
  return cells(lines[at]).length === cells(next).length;
}

function cells(line) {
  const row = line
    .trim()
    .replace(/^\|/, '')
    .replace(/(?<!\\)\|$/, '');
  return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll('\\|', '|'));
}

function table(lines, at, isOpen) {
  const sides = cells(lines[at + 1]).map((cell) => {
    if (!cell.endsWith(':')) return {};
    return { class: cell.startsWith(':') ? 'center' : 'right' };
  });
  const row = (line, tag, open) => {
    const found = cells(line);
    const shown = sides.map((side, i) => node(tag, inline(found[i] ?? '', open), side));
    return node('tr', shown);
  };
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines, end)) end++;
  const rows = lines
    .slice(at + 2, end)
    .map((line, i) => row(line, 'td', isOpen && at + 2 + i === lines.length - 1));
  const parts = [node('thead', [row(lines[at], 'th', false)])];
  if (rows.length) parts.push(node('tbody', rows));
  const attributes = { class: 'table', tabindex: '0', role: 'group', 'aria-label': 'Table' };
  return [node('div', [node('table', parts)], attributes), end];
}

/** Return whether a line ends a paragraph before it. */
function interrupts(lines, at) {
  const line = lines[at].trim();
  if (indentOf(lines[at]) >= 4) return false;
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || line.startsWith('>'))
    return true;
  const item = ITEM.exec(line);
  if (item !== null && item[3] && (!/\d/.test(item[1]) || parseInt(item[1], 10) === 1)) return true;
  return isTable(lines, at);
}

function paragraph(lines, at, isOpen) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines, end)) end++;
  const text = lines.slice(at, end).join('\n').trim();
  const isLast = isOpen && end === lines.length;
  // Marks at the end may become code or an item of a list: they are not shown yet.
  const shown = isLast
    ? text.replace(/(^|\n)[ \t]*(?:`{1,3}|~{1,3}|[-*+#]{1,3}|\d{1,3}\.?)$/, '')
    : text;
  if (!shown) return [isLast ? node('p') : node('p', [text]), end];
  return [node('p', inline(shown, isLast)), end];
}
