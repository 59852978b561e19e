//! The machine: KVM, boot, devices, and the command line.
