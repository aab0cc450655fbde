//! What happens when another program cuts a mapped file short: one line of error, exit code 1.
//!
//! A read past a mapped file's new end is not an error that code can handle: the system sends
//! SIGBUS, which ends a process without a word. The handler here names the file first.
//! Windows has no such case: a mapped file can't be cut there.
#![allow(unsafe_code)]

/// A mapped range that the handler knows, for as long as this lives.
#[derive(Debug)]
pub(super) struct Watched(#[cfg_attr(not(unix), allow(dead_code))] Option<usize>);

#[cfg(not(unix))]
impl Watched {
    pub(super) fn new(_: &[u8], _: &std::path::Path) -> Watched {
        Watched(None)
    }
}

/// Makes this process end with a line that names the file, where it would die of SIGBUS. For a
/// program's start: a signal's handler belongs to the whole process.
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

    /// A mapped range, and what to say of it; free where the message is null.
    struct Slot {
        start: AtomicUsize,
        len: AtomicUsize,
        message: AtomicPtr<Vec<u8>>,
    }

    /// Far more than files are open at once. A file that finds no slot goes without its message.
    const SLOTS: usize = 1024;
    static TABLE: [Slot; SLOTS] = [const {
        Slot {
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            message: AtomicPtr::new(null_mut()),
        }
    }; SLOTS];
    /// What SIGBUS did before.
    static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();
    static SAID: AtomicBool = AtomicBool::new(false);

    impl Watched {
        pub(in super::super) fn new(bytes: &[u8], path: &Path) -> Watched {
            // On a terminal the line of a progress bar stands before it.
            let begin = if std::io::stderr().is_terminal() { "\n" } else { "" };
            let what =
                "was cut short by another program while it was in use; start again with the whole file";
            let text = format!("{begin}error: {}: {what}\n", path.display());
            let message = Box::into_raw(Box::new(text.into_bytes()));
            let free = |slot: &Slot| {
                slot.message.compare_exchange(null_mut(), message, SeqCst, SeqCst).is_ok()
            };
            let slot = TABLE.iter().position(free);
            match slot {
                Some(slot) => {
                    TABLE[slot].start.store(bytes.as_ptr() as usize, SeqCst);
                    TABLE[slot].len.store(bytes.len(), SeqCst);
                }
                // Safety: it came from a box above, and no slot took it.
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
            // Safety: it came from a box, and this slot was its only owner. The handler reads it
            // only for a fault inside the range, whose map outlives every borrow of it.
            drop(unsafe { Box::from_raw(message) });
        }
    }

    /// Makes this process end with a line that names the file, where it would die of SIGBUS. For a
    /// program's start: a signal's handler belongs to the whole process.
    pub fn name_files_cut_short() {
        // Safety: both structs are plain data, for which zeros are a value; the handler has the
        // signature that SA_SIGINFO asks for and calls only what a handler may call.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction =
                handle as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            let mut before: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, &action, &mut before) == 0 {
                let _ = BEFORE.set(before);
            }
        }
    }

    extern "C" fn handle(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // Safety: the system passes a valid siginfo with SIGBUS.
        let at = unsafe { (*info).si_addr() } as usize;
        let hit = |s: &&Slot| at.wrapping_sub(s.start.load(SeqCst)) < s.len.load(SeqCst);
        match TABLE.iter().find(hit) {
            // Safety: only write and _exit are called, which a handler may call. The message lives
            // as long as the map, whose bytes the interrupted code is reading.
            Some(slot) => unsafe {
                // Threads fault together; one speaks, the others wait for the end.
                while SAID.swap(true, SeqCst) {
                    std::hint::spin_loop();
                }
                let text = &*slot.message.load(SeqCst);
                libc::write(2, text.as_ptr().cast(), text.len());
                libc::_exit(1)
            },
            // Not a mapped file: as without this handler, when the instruction faults again.
            // Safety: sigaction may be called from a handler; null asks for no old value.
            None => unsafe {
                if let Some(before) = BEFORE.get() {
                    libc::sigaction(libc::SIGBUS, before, null_mut());
                } else {
                    libc::_exit(1)
                }
            },
        }
    }
}
