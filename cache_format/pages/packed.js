// Data that a page carries as text in <script type="text/plain" id="...">: see packed.py.
"use strict";

// The element, once the browser has read all of it: data stands behind the scripts.
async function arrived(id) {
  for (;;) {
    const element = document.getElementById(id);
    if (document.readyState !== "loading" || element?.nextElementSibling) return element;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function unpackedBytes(id) {
  const element = await arrived(id);
  const stream = new Blob([bytesOf(element.textContent)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpackedJson(id) {
  return JSON.parse(new TextDecoder().decode(await unpackedBytes(id)));
}

// {name: Float32Array or Int32Array}
async function unpackedArrays(id) {
  const bytes = await unpackedBytes(id);
  const size = new DataView(bytes.buffer).getUint32(0, true);
  const columns = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
  const found = {};
  let at = 4 + size;
  for (const [name, type, length] of columns) {
    const words = new Int32Array(length);
    const b0 = at, b1 = at + length, b2 = b1 + length, b3 = b2 + length;
    for (let i = 0; i < length; i++) {
      words[i] = bytes[b0 + i] | (bytes[b1 + i] << 8) | (bytes[b2 + i] << 16) | (bytes[b3 + i] << 24);
    }
    found[name] = type === "float32" ? new Float32Array(words.buffer) : words;
    at += 4 * length;
  }
  return found;
}
