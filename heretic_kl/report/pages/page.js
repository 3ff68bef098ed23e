"use strict";
// Values of marks while they are pointed at, the same trial in every chart, details that open.
const tip = document.getElementById("tip");
const labelled = (target) => target instanceof Element && target.closest(".chart [aria-label][role='graphics-symbol']");
function show(mark, x, y) {
  tip.textContent = mark.getAttribute("aria-label");
  tip.hidden = false;
  tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = Math.max(4, y - tip.offsetHeight - 10) + "px";
}
function twins(target, on) {
  const link = target instanceof Element && target.closest(".chart a[href]");
  if (!link) return;
  for (const twin of document.querySelectorAll(".chart a[href]"))
    if (twin.getAttribute("href") === link.getAttribute("href")) twin.classList.toggle("twin", on);
}
document.addEventListener("pointermove", (event) => {
  const mark = labelled(event.target);
  if (mark && mark.tagName !== "g") show(mark, event.clientX, event.clientY);
  else tip.hidden = true;
});
document.addEventListener("pointerover", (event) => twins(event.target, true));
document.addEventListener("pointerout", (event) => twins(event.target, false));
document.addEventListener("focusin", (event) => {
  twins(event.target, true);
  const mark = event.target instanceof SVGElement && event.target.querySelector("[aria-label]");
  if (!mark) return;
  const box = mark.getBoundingClientRect();
  show(mark, box.right, box.top);
});
document.addEventListener("focusout", (event) => { twins(event.target, false); tip.hidden = true; });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
function open() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.querySelector("summary").focus();
  }
}
addEventListener("hashchange", open);
open();
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open], .trial)")];
  for (const details of opened) details.open = true;
});
addEventListener("afterprint", () => { for (const details of opened) details.open = false; });
