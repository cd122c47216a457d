// A stand-in for Worker in a site that is opened from a folder, where browsers start no workers: the
// search runs in a hidden frame.
(() => {
  if (location.protocol !== "file:") return

  class FrameWorker extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow, page = this.frame.contentDocument
      const load = source => new Promise((loaded, failed) => {
        const script = page.createElement("script")
        script.src = source
        script.onload = loaded
        script.onerror = () => failed(new Error(`${source} cannot be loaded`))
        page.body.append(script)
      })
      // What the script of a worker finds in its global scope.
      inside.postMessage = data => {
        const message = new MessageEvent("message", { data })
        this.dispatchEvent(message)
        this.onmessage?.(message)
      }
      inside.importScripts = async (...sources) => {
        for (const source of sources) await load(source)
      }
      this.ready = load(url)
      this.ready.catch(error => this.dispatchEvent(new ErrorEvent("error", { message: error.message })))
    }

    postMessage(data) {
      const inside = this.frame.contentWindow
      this.ready.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })), () => {})
    }

    terminate() {
      this.frame.remove()
    }
  }

  window.Worker = FrameWorker
})()
