"use strict";

// What a mark of a picture stands for, under the pointer, on a tap, or where the keyboard is.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("aria-hidden", "true"); // it repeats the mark's label
document.body.append(tip);

let told = null;

function hideTip() {
  told = null;
  tip.hidden = true;
}

function placeTip() {
  if (told === null) return;
  const at = told.getBoundingClientRect();
  const left = at.left + (at.width - tip.offsetWidth) / 2;
  const most = document.documentElement.clientWidth - tip.offsetWidth - 8;
  const above = at.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(8, Math.min(left, most))}px`;
  tip.style.top = `${above > 8 ? above : at.bottom + 6}px`;
}

function showTip(event) {
  // The pointer may rest anywhere while the keyboard is at a mark.
  const mark = event.target.closest(".mark") ?? document.activeElement.closest(".mark");
  if (mark === null) return hideTip();
  told = mark;
  tip.textContent = mark.getAttribute("aria-label");
  tip.hidden = false;
  placeTip();
}

document.addEventListener("pointerover", showTip);
document.addEventListener("focusin", showTip);
document.addEventListener("focusout", hideTip);
document.addEventListener("scroll", placeTip, { capture: true, passive: true });

// Arrows go from mark to mark, from left to right; bars begin at one place and keep their order.
const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") return hideTip();
  const mark = event.target.closest(".mark");
  if (mark === null || !(event.key in steps)) return;
  const place = (each) => Math.round(each.getBoundingClientRect().left);
  const marks = [...mark.closest("svg").querySelectorAll(".mark")].sort((a, b) => place(a) - place(b));
  const next = marks.at((marks.indexOf(mark) + steps[event.key]) % marks.length);
  mark.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  event.preventDefault();
});

// What many tables come to lies on the page compressed, and is unpacked when the first of them is opened.
let parts = null;
async function unpack() {
  const bytes = Uint8Array.from(atob(document.getElementById("parts").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return (await new Response(stream).text()).split("\n");
}

let openedToPrint = [];
document.addEventListener(
  "toggle",
  async (event) => {
    const place = event.target.querySelector("[data-part]");
    if (place === null || openedToPrint.length > 0 || !("DecompressionStream" in window)) return;
    parts ??= unpack();
    place.innerHTML = (await parts)[place.dataset.part];
    place.removeAttribute("data-part");
  },
  { capture: true },
);

// On paper everything is open.
window.addEventListener("beforeprint", () => {
  openedToPrint = [...document.querySelectorAll("details:not([open])")];
  openedToPrint.forEach((each) => (each.open = true));
});
window.addEventListener("afterprint", () => {
  openedToPrint.forEach((each) => (each.open = false));
  openedToPrint = [];
});
