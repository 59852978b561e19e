//! The command line: which workload, and how.
//!
//! ```text
//! workload=hello                                                       (the default)
//! workload=verify pages=all|N seed=S order=seq|random full=on|off
//! workload=touch  pages=all|N order=seq|random|stride rounds=R seed=S stride=P
//! workload=dirty  pages=all|N order=seq|random|stride rounds=R|forever seed=S stride=P
//! workload=watch  pages=all|N rounds=R|forever period_us=P
//! workload=balloon pages=all|N how=inflate|report|target wait=on|off rounds=R order=… seed=S stride=P
//! workload=fault  kind=page-fault|invalid-opcode|double-fault|panic
//! ```
//!
//! Defaults: `pages=all order=seq rounds=1 seed=0 stride=16 full=on kind=page-fault`. Numbers are decimal or, after `0x`,
//! hexadecimal. `pages=N` are the first N, with `order=random` any N. `seed` is for `verify` and for `order=random`, `stride` for `order=stride`.
//! Nothing is ignored in silence: a word that the workload has no use for is an error, except for the words that a VMM adds by
//! itself ([`is_machine_word`]), which are named in a line `ignored=…`.

use core::fmt;

use crate::order::Order;
use crate::parking::MAX_TASKS;

/// The longest command line that the guest reads.
pub const MAX_LENGTH: usize = 4096;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Say that the machine is up.
    Hello,
    /// Check that every page holds its fingerprint.
    Verify {
        /// How many.
        pages: Pages,
        /// Of the fingerprints, and of a random order.
        seed: u64,
        /// In which order.
        order: Order,
        /// Every word, or a few of each page.
        full: bool,
    },
    /// Read one word of every page.
    Touch {
        /// How many.
        pages: Pages,
        /// In which order.
        order: Order,
        /// How often.
        rounds: u64,
    },
    /// Write to every page and check that the last write is still there.
    Dirty {
        /// How many.
        pages: Pages,
        /// In which order.
        order: Order,
        /// How often; `None` is for ever.
        rounds: Option<u64>,
    },
    /// Write to every page, then only look at the clock.
    Watch {
        /// How many.
        pages: Pages,
        /// How often to tell; `None` is for ever.
        rounds: Option<u64>,
        /// How long a round takes, in microseconds.
        period_us: u64,
    },
    /// Let tasks touch pages while others work.
    Tasks(Tasks),
    /// Give pages back by the balloon, and use them again.
    Balloon {
        /// How many.
        pages: Pages,
        /// In which order.
        order: Order,
        /// By which queue.
        how: How,
        /// Whether it waits for another target before it gives pages, and before it uses them again.
        wait: bool,
        /// How often.
        rounds: u64,
    },
    /// Fail on purpose, to show how that is reported.
    Fault(FaultKind),
}

/// How [`Workload::Balloon`] gives pages back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It puts all of them into the balloon and takes them out again.
    Inflate,
    /// It reports them as free.
    Report,
    /// It puts as many into the balloon as that is to hold, until it is to hold none any more.
    Target,
}

/// What [`Workload::Tasks`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tasks {
    /// How many tasks each CPU has.
    pub tasks: usize,
    /// How many of them touch pages; the others work.
    pub faulting: usize,
    /// The pages that are touched, by all CPUs together.
    pub pages: Pages,
    /// Of the fingerprints, and of a random order.
    pub seed: u64,
    /// In which order.
    pub order: Order,
    /// How long a task may be parked, in seconds.
    pub patience_s: u32,
}

/// Which pages a workload takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// All that there are.
    All,
    /// The first so many.
    First(u64),
}

/// How [`Workload::Fault`] fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Reads where nothing is mapped.
    PageFault,
    /// Executes `ud2`.
    InvalidOpcode,
    /// Has an exception while the exception stack is unusable.
    DoubleFault,
    /// Panics.
    Panic,
}

/// Why a command line was refused; it displays as the words of one line of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error<'a> {
    /// There is no such workload.
    UnknownWorkload(&'a str),
    /// The workload has no such option.
    UnknownOption(&'a str),
    /// The option is there twice.
    Duplicate(&'a str),
    /// The option is there, but its value makes no sense.
    BadValue {
        /// The whole word.
        word: &'a str,
        /// What would make sense.
        expected: &'static str,
    },
    /// The option only has a meaning together with another one.
    Needs {
        /// The whole word.
        word: &'a str,
        /// The other one.
        other: &'static str,
    },
}

impl fmt::Display for Error<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Error::UnknownWorkload(word) => {
                write!(
                    f,
                    "error=unknown_workload word={word} expected=hello|verify|touch|dirty|watch|tasks|balloon|fault"
                )
            }
            Error::UnknownOption(word) => write!(f, "error=unknown_option word={word}"),
            Error::Duplicate(word) => write!(f, "error=duplicate_option word={word}"),
            Error::BadValue { word, expected } => {
                write!(f, "error=bad_value word={word} expected={expected}")
            }
            Error::Needs { word, other } => write!(f, "error=useless_option word={word} needs={other}"),
        }
    }
}

/// Whether a word is one that a VMM adds to the command line by itself: Firecracker's `pci=off` and its
/// `virtio_mmio.device=…`.
pub fn is_machine_word(word: &str) -> bool {
    word == "pci=off" || word.starts_with("virtio_mmio.device=")
}

/// The words on a command line that are ignored, but not in silence.
pub fn ignored_words(line: &str) -> impl Iterator<Item = &str> {
    line.split_ascii_whitespace().filter(|word| is_machine_word(word))
}

/// Reads a command line.
pub fn parse(line: &str) -> Result<Workload, Error<'_>> {
    let options = Options { line };
    let known = match options.value("workload")?.unwrap_or("hello") {
        "hello" => [].as_slice(),
        "verify" => &["pages", "seed", "order", "full"],
        "touch" | "dirty" => &["pages", "order", "rounds", "seed", "stride"],
        "watch" => &["pages", "rounds", "period_us"],
        "tasks" => &["tasks", "faulting", "pages", "seed", "order", "patience"],
        "balloon" => &["pages", "how", "wait", "rounds", "order", "seed", "stride"],
        "fault" => &["kind"],
        _ => return Err(Error::UnknownWorkload(options.word("workload"))),
    };
    for word in options.words() {
        let key = word.split_once('=').map_or(word, |(key, _)| key);
        if !word.contains('=') || key != "workload" && !known.contains(&key) {
            return Err(Error::UnknownOption(word));
        }
    }
    match options.value("workload")?.unwrap_or("hello") {
        "verify" => options.verify(),
        "touch" => Ok(Workload::Touch {
            pages: options.pages()?,
            order: options.order()?,
            rounds: options.number("rounds", 1, 1)?,
        }),
        "dirty" => Ok(Workload::Dirty {
            pages: options.pages()?,
            order: options.order()?,
            rounds: options.rounds()?,
        }),
        "watch" => Ok(Workload::Watch {
            pages: options.pages()?,
            rounds: options.rounds()?,
            period_us: options.number("period_us", 100_000, 1)?,
        }),
        "tasks" => options.tasks().map(Workload::Tasks),
        "balloon" => options.balloon(),
        "fault" => options.fault(),
        _ => Ok(Workload::Hello),
    }
}

/// The words of a command line. There are few of them, so each option looks for its own.
struct Options<'a> {
    line: &'a str,
}

impl<'a> Options<'a> {
    fn words(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.line
            .split_ascii_whitespace()
            .filter(|word| !is_machine_word(word))
    }

    /// The value of option `key`, which may be there once.
    fn value(&self, key: &str) -> Result<Option<&'a str>, Error<'a>> {
        let mut found = None;
        for word in self.words() {
            let Some((_, value)) = word.split_once('=').filter(|(name, _)| *name == key) else {
                continue;
            };
            if found.replace(value).is_some() {
                return Err(Error::Duplicate(word));
            }
        }
        Ok(found)
    }

    /// The whole word of option `key`, for messages.
    fn word(&self, key: &str) -> &'a str {
        self.words()
            .find(|word| word.split_once('=').is_some_and(|(name, _)| name == key))
            .unwrap_or_default()
    }

    fn number(&self, key: &str, default: u64, least: u64) -> Result<u64, Error<'a>> {
        let Some(value) = self.value(key)? else {
            return Ok(default);
        };
        number(value).filter(|&n| n >= least).ok_or(Error::BadValue {
            word: self.word(key),
            expected: if least > 0 { "a_number_above_0" } else { "a_number" },
        })
    }

    fn pages(&self) -> Result<Pages, Error<'a>> {
        match self.value("pages")? {
            None | Some("all") => Ok(Pages::All),
            Some(value) => match number(value) {
                Some(n) if n > 0 => Ok(Pages::First(n)),
                _ => Err(Error::BadValue {
                    word: self.word("pages"),
                    expected: "all|a_number_above_0",
                }),
            },
        }
    }

    /// How often; `None` is for ever.
    fn rounds(&self) -> Result<Option<u64>, Error<'a>> {
        match self.value("rounds")? {
            Some("forever") => Ok(None),
            _ => self.number("rounds", 1, 1).map(Some),
        }
    }

    fn order(&self) -> Result<Order, Error<'a>> {
        let order = match self.value("order")? {
            None | Some("seq") => Order::Sequential,
            Some("random") => Order::Random {
                seed: self.number("seed", 0, 0)?,
            },
            Some("stride") => Order::Stride {
                stride: self.number("stride", 16, 1)?,
            },
            Some(_) => {
                return Err(Error::BadValue {
                    word: self.word("order"),
                    expected: "seq|random|stride",
                });
            }
        };
        for (key, other, used) in [
            ("seed", "order=random", matches!(order, Order::Random { .. })),
            ("stride", "order=stride", matches!(order, Order::Stride { .. })),
        ] {
            if !used && self.value(key)?.is_some() {
                let word = self.word(key);
                return Err(Error::Needs { word, other });
            }
        }
        Ok(order)
    }

    fn verify(&self) -> Result<Workload, Error<'a>> {
        let seed = self.number("seed", 0, 0)?;
        Ok(Workload::Verify {
            pages: self.pages()?,
            seed,
            order: self.seeded_order(seed)?,
            full: match self.value("full")? {
                None | Some("on") => true,
                Some("off") => false,
                Some(_) => {
                    return Err(Error::BadValue {
                        word: self.word("full"),
                        expected: "on|off",
                    });
                }
            },
        })
    }

    /// An order that takes its seed from the pages' content.
    fn seeded_order(&self, seed: u64) -> Result<Order, Error<'a>> {
        match self.value("order")? {
            None | Some("seq") => Ok(Order::Sequential),
            Some("random") => Ok(Order::Random { seed }),
            Some(_) => Err(Error::BadValue {
                word: self.word("order"),
                expected: "seq|random",
            }),
        }
    }

    fn balloon(&self) -> Result<Workload, Error<'a>> {
        let how = match self.value("how")? {
            None | Some("inflate") => How::Inflate,
            Some("report") => How::Report,
            Some("target") => How::Target,
            Some(_) => {
                return Err(Error::BadValue {
                    word: self.word("how"),
                    expected: "inflate|report|target",
                });
            }
        };
        for key in ["rounds", "wait"] {
            if how == How::Target && self.value(key)?.is_some() {
                return Err(Error::Needs {
                    word: self.word(key),
                    other: "how=inflate|report",
                });
            }
        }
        let wait = match self.value("wait")? {
            None | Some("off") => false,
            Some("on") => true,
            Some(_) => {
                return Err(Error::BadValue {
                    word: self.word("wait"),
                    expected: "on|off",
                });
            }
        };
        Ok(Workload::Balloon {
            pages: self.pages()?,
            order: self.order()?,
            how,
            wait,
            rounds: self.number("rounds", 1, 1)?,
        })
    }

    fn tasks(&self) -> Result<Tasks, Error<'a>> {
        let few = |key, default: u64, most: u64, expected| match self.number(key, default, 1)? {
            number if number <= most => Ok(number as usize),
            _ => Err(Error::BadValue {
                word: self.word(key),
                expected,
            }),
        };
        let tasks = few("tasks", 64, MAX_TASKS as u64, "1_to_128")?;
        let default = (tasks as u64).div_ceil(2);
        let faulting = few("faulting", default, tasks as u64, "at_most_tasks")?;
        let seed = self.number("seed", 0, 0)?;
        Ok(Tasks {
            tasks,
            faulting,
            pages: self.pages()?,
            seed,
            order: self.seeded_order(seed)?,
            patience_s: few("patience", 10, 3600, "1_to_3600")? as u32,
        })
    }

    fn fault(&self) -> Result<Workload, Error<'a>> {
        Ok(Workload::Fault(match self.value("kind")? {
            None | Some("page-fault") => FaultKind::PageFault,
            Some("invalid-opcode") => FaultKind::InvalidOpcode,
            Some("double-fault") => FaultKind::DoubleFault,
            Some("panic") => FaultKind::Panic,
            Some(_) => {
                return Err(Error::BadValue {
                    word: self.word("kind"),
                    expected: "page-fault|invalid-opcode|double-fault|panic",
                });
            }
        }))
    }
}

fn number(text: &str) -> Option<u64> {
    // from_str_radix takes a sign, this takes none.
    let digits = |text: &str, radix| match text.as_bytes() {
        [first, ..] if first.is_ascii_alphanumeric() => u64::from_str_radix(text, radix).ok(),
        _ => None,
    };
    match text.strip_prefix("0x") {
        Some(text) => digits(text, 16),
        None => digits(text, 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_is_hello() {
        assert_eq!(parse(""), Ok(Workload::Hello));
        assert_eq!(parse("  workload=hello \n"), Ok(Workload::Hello));
    }

    #[test]
    fn defaults() {
        assert_eq!(
            parse("workload=verify"),
            Ok(Workload::Verify {
                pages: Pages::All,
                seed: 0,
                order: Order::Sequential,
                full: true
            })
        );
        assert_eq!(
            parse("workload=touch order=stride"),
            Ok(Workload::Touch {
                pages: Pages::All,
                order: Order::Stride { stride: 16 },
                rounds: 1
            })
        );
        assert_eq!(parse("workload=fault"), Ok(Workload::Fault(FaultKind::PageFault)));
        assert_eq!(
            parse("workload=tasks"),
            Ok(Workload::Tasks(Tasks {
                tasks: 64,
                faulting: 32,
                pages: Pages::All,
                seed: 0,
                order: Order::Sequential,
                patience_s: 10
            }))
        );
    }

    #[test]
    fn everything_given() {
        assert_eq!(
            parse("full=off order=random seed=0x2a pages=7 workload=verify"),
            Ok(Workload::Verify {
                pages: Pages::First(7),
                seed: 42,
                order: Order::Random { seed: 42 },
                full: false
            })
        );
        assert_eq!(
            parse("workload=touch pages=all order=random seed=3 rounds=2"),
            Ok(Workload::Touch {
                pages: Pages::All,
                order: Order::Random { seed: 3 },
                rounds: 2
            })
        );
        assert_eq!(
            parse("workload=dirty rounds=forever order=stride stride=512"),
            Ok(Workload::Dirty {
                pages: Pages::All,
                order: Order::Stride { stride: 512 },
                rounds: None
            })
        );
        assert_eq!(
            parse("workload=watch pages=3 rounds=forever period_us=500"),
            Ok(Workload::Watch {
                pages: Pages::First(3),
                rounds: None,
                period_us: 500
            })
        );
    }

    #[test]
    fn errors_name_the_word() {
        let message = |line| parse(line).unwrap_err().to_string();
        for (line, expected) in [
            (
                "workload=nap",
                "error=unknown_workload word=workload=nap expected=hello|verify|touch|dirty|watch|tasks|balloon|fault",
            ),
            (
                "workload=tasks tasks=129",
                "error=bad_value word=tasks=129 expected=1_to_128",
            ),
            (
                "workload=tasks tasks=4 faulting=5",
                "error=bad_value word=faulting=5 expected=at_most_tasks",
            ),
            (
                "workload=tasks patience=0",
                "error=bad_value word=patience=0 expected=a_number_above_0",
            ),
            ("workload=hello pages=3", "error=unknown_option word=pages=3"),
            ("workload=verify quiet", "error=unknown_option word=quiet"),
            ("workload", "error=unknown_option word=workload"),
            ("workload=verify pages", "error=unknown_option word=pages"),
            ("workload=touch full=on", "error=unknown_option word=full=on"),
            (
                "workload=touch pages=-1",
                "error=bad_value word=pages=-1 expected=all|a_number_above_0",
            ),
            (
                "workload=touch pages=0",
                "error=bad_value word=pages=0 expected=all|a_number_above_0",
            ),
            (
                "workload=touch rounds=forever",
                "error=bad_value word=rounds=forever expected=a_number_above_0",
            ),
            (
                "workload=verify seed=0x",
                "error=bad_value word=seed=0x expected=a_number",
            ),
            (
                "workload=verify seed=0x+1",
                "error=bad_value word=seed=0x+1 expected=a_number",
            ),
            (
                "workload=verify seed=18446744073709551616",
                "error=bad_value word=seed=18446744073709551616 expected=a_number",
            ),
            (
                "workload=verify order=stride",
                "error=bad_value word=order=stride expected=seq|random",
            ),
            (
                "workload=verify full=",
                "error=bad_value word=full= expected=on|off",
            ),
            (
                "workload=hello workload=hello",
                "error=duplicate_option word=workload=hello",
            ),
            (
                "workload=touch pages=1 pages=2",
                "error=duplicate_option word=pages=2",
            ),
            (
                "workload=touch stride=4",
                "error=useless_option word=stride=4 needs=order=stride",
            ),
            (
                "workload=balloon how=much",
                "error=bad_value word=how=much expected=inflate|report|target",
            ),
            (
                "workload=balloon how=target rounds=2",
                "error=useless_option word=rounds=2 needs=how=inflate|report",
            ),
            (
                "workload=balloon wait=long",
                "error=bad_value word=wait=long expected=on|off",
            ),
            (
                "workload=dirty order=stride seed=4",
                "error=useless_option word=seed=4 needs=order=random",
            ),
        ] {
            assert_eq!(message(line), expected, "{line}");
        }
    }

    #[test]
    fn a_balloon_is_used_as_it_is_said() {
        assert_eq!(
            parse("workload=balloon"),
            Ok(Workload::Balloon {
                pages: Pages::All,
                order: Order::Sequential,
                how: How::Inflate,
                wait: false,
                rounds: 1
            })
        );
        assert_eq!(
            parse("workload=balloon pages=5 how=report wait=on rounds=3 order=random seed=2"),
            Ok(Workload::Balloon {
                pages: Pages::First(5),
                order: Order::Random { seed: 2 },
                how: How::Report,
                wait: true,
                rounds: 3
            })
        );
    }

    #[test]
    fn the_machines_own_words_are_known() {
        let line = "pci=off workload=hello virtio_mmio.device=4K@0xd0000000:5";
        assert_eq!(parse(line), Ok(Workload::Hello));
        assert_eq!(
            ignored_words(line).collect::<Vec<_>>(),
            ["pci=off", "virtio_mmio.device=4K@0xd0000000:5"]
        );
    }

    proptest! {
        #[test]
        fn no_line_panics(line in "(workload=(verify|touch|dirty|watch|tasks|balloon|x)| |pages=|order=|seed=|how=|[a-z0-9=é]{0,4}){0,9}") {
            if let Err(error) = parse(&line) {
                prop_assert!(error.to_string().starts_with("error="));
            }
        }
    }
}
