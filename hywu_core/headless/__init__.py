"""ComfyUI without its frontend: a client for a server's API, and a server on this machine.

`client.Client` talks to any ComfyUI server (needs aiohttp); `local.LocalServer` starts one from a tree on
this disk (standard library only, so that dev.py can use it before anything is installed).
"""
