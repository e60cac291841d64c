/* Elements of the page. Text is always put in as text: nothing here reads HTML. */

const SVG = 'http://www.w3.org/2000/svg';

/**
 * Make an element.
 * @param {string} tag The name of the element.
 * @param {Object} attributes A function adds a listener ("onclick"); true and false set and leave
 *   out an attribute without a value; null and undefined leave it out.
 * @param {...(Node|string|null)} children What it holds; null holds nothing.
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, '');
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Make an icon, which the page's file holds under the id "i-NAME". */
export function icon(name) {
  const svg = document.createElementNS(SVG, 'svg');
  const use = document.createElementNS(SVG, 'use');
  svg.setAttribute('class', 'icon');
  svg.setAttribute('aria-hidden', 'true');
  use.setAttribute('href', `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Make a button that shows an icon and has a name. */
export function iconButton(name, label, onclick, attributes = {}) {
  const given = { type: 'button', class: 'icon-button', 'aria-label': label, title: label };
  return h('button', { ...given, onclick, ...attributes }, icon(name));
}

/** Return the element with an id. */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * Change the children of an element from old nodes to new ones; what is equal stays untouched.
 *
 * A node is a text, or an object with tag, attributes and children. Text that has grown is
 * appended to, so that a selection in it stays.
 * @param {Element} parent The element.
 * @param {Array} old The nodes that its children show now, from `first` on.
 * @param {Array} next The nodes to show.
 * @param {number} first The number of children before them, which stay.
 */
export function patch(parent, old, next, first = 0) {
  const shared = Math.min(old.length, next.length);
  for (let i = 0; i < shared; i++) change(parent, parent.childNodes[first + i], old[i], next[i]);
  for (let i = shared; i < next.length; i++) parent.append(create(next[i]));
  while (parent.childNodes.length > first + next.length) parent.lastChild.remove();
}

function create(node) {
  if (typeof node === 'string') return document.createTextNode(node);
  const element = document.createElement(node.tag);
  for (const [name, value] of Object.entries(node.attributes)) element.setAttribute(name, value);
  element.append(...node.children.map(create));
  return element;
}

function change(parent, shown, old, next) {
  if (old === next) return;
  if (typeof old === 'string' && typeof next === 'string') {
    if (next.startsWith(old)) shown.appendData(next.slice(old.length));
    else shown.data = next;
    return;
  }
  const isSame = old.tag !== undefined && old.tag === next.tag;
  if (!isSame || JSON.stringify(old.attributes) !== JSON.stringify(next.attributes)) {
    parent.replaceChild(create(next), shown);
    return;
  }
  patch(shown, old.children, next.children);
}
