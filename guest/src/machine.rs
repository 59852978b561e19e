//! What a workload needs of the machine under it, so that the host can put another one there.

use core::fmt;

/// How [`Machine::combine`] makes one number of every CPU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combine {
    /// The sum, modulo 2^64.
    Sum,
    /// The greatest.
    Max,
}

impl Combine {
    /// One number of many.
    pub fn fold(self, values: impl Iterator<Item = u64>) -> u64 {
        match self {
            Combine::Sum => values.fold(0, u64::wrapping_add),
            Combine::Max => values.max().unwrap_or(0),
        }
    }
}

/// The machine as one of its CPUs sees it. Every CPU runs the same workload on its share of the pages.
pub trait Machine {
    /// This CPU's number, from 0.
    fn cpu(&self) -> u64;

    /// How many CPUs there are.
    fn cpus(&self) -> u64;

    /// Bytes of RAM, used or not.
    fn ram_bytes(&self) -> u64;

    /// Reads a word of a page frame, really and now.
    fn read(&self, frame: u64, word: usize) -> u64;

    /// Writes a word of a page frame, really and now.
    fn write(&self, frame: u64, word: usize, value: u64);

    /// A clock that runs through pauses of the virtual machine.
    fn ticks(&self) -> u64;

    /// What a number of [`ticks`](Machine::ticks) is in microseconds.
    fn microseconds(&self, ticks: u64) -> u64;

    /// Prints one line.
    fn print(&self, line: fmt::Arguments<'_>);

    /// Waits until every CPU has called this, and gives each the same result.
    fn combine(&self, value: u64, how: Combine) -> u64;
}

#[cfg(test)]
pub(crate) mod fake {
    //! A machine of host threads and a map.

    use super::{Combine, Machine};
    use crate::fingerprint::PAGE_WORDS;
    use std::collections::BTreeMap;
    use std::fmt;
    use std::sync::{Barrier, Mutex};
    use std::thread;

    pub(crate) struct Shared {
        pub(crate) memory: Mutex<BTreeMap<u64, [u64; PAGE_WORDS]>>,
        pub(crate) lines: Mutex<Vec<String>>,
        /// The frames that were touched, in order, with the CPU that did it.
        pub(crate) touched: Mutex<Vec<(u64, u64)>>,
        ticks: Mutex<u64>,
        values: Mutex<Vec<u64>>,
        barrier: Barrier,
        cpus: usize,
    }

    impl Shared {
        pub(crate) fn new(cpus: usize) -> Self {
            Self {
                memory: Mutex::default(),
                lines: Mutex::default(),
                touched: Mutex::default(),
                ticks: Mutex::default(),
                values: Mutex::new(vec![0; cpus]),
                barrier: Barrier::new(cpus),
                cpus,
            }
        }

        /// Runs `work` on every CPU; all must come to the same result.
        pub(crate) fn run<R: Send + PartialEq + fmt::Debug>(
            &self,
            work: impl Fn(&FakeMachine<'_>) -> R + Sync,
        ) -> R {
            let mut results = thread::scope(|scope| {
                let work = &work;
                let cpus: Vec<_> = (0..self.cpus)
                    .map(|cpu| scope.spawn(move || work(&FakeMachine { shared: self, cpu })))
                    .collect();
                cpus.into_iter()
                    .map(|cpu| cpu.join().unwrap())
                    .collect::<Vec<_>>()
            });
            let first = results.pop().unwrap();
            assert!(results.iter().all(|result| *result == first));
            first
        }

        pub(crate) fn lines(&self) -> Vec<String> {
            self.lines.lock().unwrap().clone()
        }
    }

    pub(crate) struct FakeMachine<'a> {
        shared: &'a Shared,
        cpu: usize,
    }

    impl Machine for FakeMachine<'_> {
        fn cpu(&self) -> u64 {
            self.cpu as u64
        }

        fn cpus(&self) -> u64 {
            self.shared.cpus as u64
        }

        fn ram_bytes(&self) -> u64 {
            256 << 20
        }

        fn read(&self, frame: u64, word: usize) -> u64 {
            self.shared.touched.lock().unwrap().push((self.cpu(), frame));
            let memory = self.shared.memory.lock().unwrap();
            memory.get(&frame).map_or(0, |page| page[word])
        }

        fn write(&self, frame: u64, word: usize, value: u64) {
            let mut memory = self.shared.memory.lock().unwrap();
            memory.entry(frame).or_insert([0; PAGE_WORDS])[word] = value;
        }

        fn ticks(&self) -> u64 {
            let mut ticks = self.shared.ticks.lock().unwrap();
            *ticks += 1000;
            *ticks
        }

        fn microseconds(&self, ticks: u64) -> u64 {
            ticks / 1000
        }

        fn print(&self, line: fmt::Arguments<'_>) {
            self.shared.lines.lock().unwrap().push(line.to_string());
        }

        fn combine(&self, value: u64, how: Combine) -> u64 {
            self.shared.values.lock().unwrap()[self.cpu] = value;
            self.shared.barrier.wait();
            let result = how.fold(self.shared.values.lock().unwrap().iter().copied());
            self.shared.barrier.wait();
            result
        }
    }
}
