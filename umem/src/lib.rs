//! User-process-backed memory.
