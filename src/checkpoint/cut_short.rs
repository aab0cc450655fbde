//! Handles a mapped file that another program truncates: one line of error, then exit code 1.
//!
//! A read past the new end of a mapped file returns no error. The operating system sends SIGBUS,
//! which ends the process without a message. The handler here prints the file's name before the
//! process ends. Windows needs no handler, because nobody can truncate a mapped file there.
#![allow(unsafe_code)]

/// Registers a mapped range with the handler until this value is dropped.
#[derive(Debug)]
pub(super) struct Watched(#[cfg_attr(not(unix), allow(dead_code))] Option<usize>);

#[cfg(not(unix))]
impl Watched {
    pub(super) fn new(_: &[u8], _: &std::path::Path) -> Watched {
        Watched(None)
    }
}

/// Makes this process name the truncated file, and exit with code 1, where SIGBUS would kill it. A
/// program calls this at its start, because a signal handler belongs to the whole process.
#[cfg(not(unix))]
pub fn name_files_cut_short() {}

#[cfg(unix)]
pub use unix::name_files_cut_short;

#[cfg(unix)]
mod unix {
    use std::io::IsTerminal;
    use std::os::raw::{c_int, c_void};
    use std::path::Path;
    use std::ptr::null_mut;
    use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::SeqCst};
    use std::sync::OnceLock;

    use super::Watched;

    /// A mapped range and its error message. A slot with a null message is free.
    struct Slot {
        start: AtomicUsize,
        len: AtomicUsize,
        message: AtomicPtr<Vec<u8>>,
    }

    /// Far more than the files that are open at once. A file that finds no free slot has no
    /// message.
    const SLOTS: usize = 1024;
    static TABLE: [Slot; SLOTS] = [const {
        Slot {
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            message: AtomicPtr::new(null_mut()),
        }
    }; SLOTS];
    /// The handler of SIGBUS before this module's.
    static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();
    /// Whether a thread has taken on printing the message.
    static PRINTING: AtomicBool = AtomicBool::new(false);

    impl Watched {
        pub(in super::super) fn new(bytes: &[u8], path: &Path) -> Watched {
            // On a terminal, a progress bar may have left its line open.
            let begin = if std::io::stderr().is_terminal() { "\n" } else { "" };
            let text = format!(
                "{begin}error: {}: was cut short by another program while it was in use; \
                 start again with the whole file\n",
                path.display()
            );
            let message = Box::into_raw(Box::new(text.into_bytes()));
            let claim = |slot: &Slot| {
                slot.message.compare_exchange(null_mut(), message, SeqCst, SeqCst).is_ok()
            };
            let slot = TABLE.iter().position(claim);
            match slot {
                Some(slot) => {
                    TABLE[slot].start.store(bytes.as_ptr() as usize, SeqCst);
                    TABLE[slot].len.store(bytes.len(), SeqCst);
                }
                // Safety: the pointer came from the box above, and no slot holds it.
                None => drop(unsafe { Box::from_raw(message) }),
            }
            Watched(slot)
        }
    }

    impl Drop for Watched {
        fn drop(&mut self) {
            let Some(slot) = self.0.map(|slot| &TABLE[slot]) else { return };
            slot.len.store(0, SeqCst);
            let message = slot.message.swap(null_mut(), SeqCst);
            // Safety: the pointer came from a box, and this slot was its only owner. The handler
            // reads the message only after a fault inside the range, and the map outlives every
            // borrow of that range.
            drop(unsafe { Box::from_raw(message) });
        }
    }

    /// Makes this process name the truncated file, and exit with code 1, where SIGBUS would kill
    /// it. A program calls this at its start, because a signal handler belongs to the whole
    /// process.
    pub fn name_files_cut_short() {
        // Safety: all zeros are a valid value of both structs, which are plain data. The handler
        // has the signature that SA_SIGINFO requires, and calls only functions that a handler may
        // call.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction =
                handle as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            let mut previous: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, &action, &mut previous) == 0 {
                let _ = PREVIOUS.set(previous);
            }
        }
    }

    extern "C" fn handle(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // Safety: the operating system passes a valid siginfo with SIGBUS.
        let address = unsafe { (*info).si_addr() } as usize;
        let covers = |s: &&Slot| address.wrapping_sub(s.start.load(SeqCst)) < s.len.load(SeqCst);
        match TABLE.iter().find(covers) {
            // Safety: a handler may call write and _exit, the only two calls. The message lives as
            // long as the map, whose bytes the interrupted code is reading.
            Some(slot) => unsafe {
                // Several threads may fault at once. The first prints; the others wait for the
                // exit.
                while PRINTING.swap(true, SeqCst) {
                    std::hint::spin_loop();
                }
                let text = &*slot.message.load(SeqCst);
                libc::write(2, text.as_ptr().cast(), text.len());
                libc::_exit(1)
            },
            // Not a mapped file. The instruction faults again, and then the previous handler runs.
            // Safety: a handler may call sigaction; null means that the old value isn't wanted.
            None => unsafe {
                if let Some(previous) = PREVIOUS.get() {
                    libc::sigaction(libc::SIGBUS, previous, null_mut());
                } else {
                    libc::_exit(1)
                }
            },
        }
    }
}
