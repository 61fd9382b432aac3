// Formulas in the form that pymdownx.arithmatex leaves them in.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], processEscapes: true },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};
document$.subscribe(() => MathJax.startup?.promise?.then(() => MathJax.typesetPromise()));
