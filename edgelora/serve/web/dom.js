// element("p.note", "text"): an element of a class with children; strings become text, never markup.
export function element(kind, ...children) {
  const [name, className] = kind.split(".");
  const node = document.createElement(name);
  if (className) node.className = className;
  node.append(...children);
  return node;
}
