// The report of a run that is going on: loads itself again, unless a table of values is open.
"use strict";

const box = document.getElementById("refresh");

try {
  box.checked = sessionStorage.getItem("logitcask-refresh") !== "off";
} catch { /* a browser that keeps nothing for files */ }
box.addEventListener("change", () => {
  try {
    sessionStorage.setItem("logitcask-refresh", box.checked ? "on" : "off");
  } catch { /* the same */ }
});
setInterval(() => {
  if (box.checked && !document.hidden && !document.querySelector("details[open]")) location.reload();
}, 1000 * Number(box.dataset.seconds));
