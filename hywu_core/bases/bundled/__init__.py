"""The bundled base model: a small image editor in pixel space that runs on a CPU."""
