// What the theme's script adds to a page, for keyboards and screen readers: the frames in which wide
// tables scroll can be reached, and the buttons of a block of code are no landmark of the page.
"use strict";

function reachable() {
  for (const frame of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) frame.tabIndex = 0;
  for (const buttons of document.querySelectorAll(".md-code__nav:not([role])")) buttons.setAttribute("role", "none");
}

new MutationObserver(reachable).observe(document.body, { childList: true, subtree: true });
reachable();
