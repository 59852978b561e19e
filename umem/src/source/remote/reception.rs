//! Who receives on a connection: its keeper, or a thread that has borrowed that.
//!
//! ```text
//!              put                        borrow
//!   (nobody) -------> the keeper's <--------------------> borrowed
//!      ^                   |        give back, or drop       |
//!      |                   | the connection ends,            | the connection ends,
//!      |                   | as the keeper sees              | as either of them sees
//!      |       wait        v                                 |
//!      +---------------- ended <-----------------------------+
//! ```
//!
//! A thread that asks and also receives the answer does with one wake-up where two threads need two. It borrows what it needs
//! for that without waiting, and may leave it at any time; so whatever takes time, connecting, pausing, asking elsewhere, is
//! the keeper's, as are the silences of a server: those are looked at by the keeper's clock, whoever receives.
//!
//! Who receives does so under a lock, for as long as it takes to hand on what has come. **A borrower never waits for that lock
//! while it may be the keeper who receives**: what is handed on may be waiting for the borrower (to read an event).

use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Release},
};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::Instant;

/// A connection `L`, which ends with an `E`, and whose turn it is to receive on it.
#[derive(Debug)]
pub(super) struct Reception<L, E> {
    state: Mutex<State<L, E>>,
    /// The loan that there is, or [`KEEPER`]. Only changed under the lock.
    loan: AtomicU64,
    /// It is no longer borrowed.
    changed: Condvar,
}

#[derive(Debug)]
struct State<L, E> {
    /// `None`: it is nobody's.
    link: Option<L>,
    ended: Option<E>,
    /// Loans so far.
    loans: u64,
}

/// No loan.
const KEEPER: u64 = 0;

/// A connection of a reception that was borrowed, by the loan's number.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Loan(u64);

/// What a keeper is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn<L, E> {
    /// Receive.
    Receive,
    /// Nothing; the time that it wanted to wait is over.
    Nothing,
    /// The connection has ended.
    Over(L, E),
}

impl<L, E> Reception<L, E> {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                link: None,
                ended: None,
                loans: KEEPER,
            }),
            loan: AtomicU64::new(KEEPER),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<L, E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, State<L, E>>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// A new connection, which is the keeper's. The one before has ended.
    pub(super) fn put(&self, link: L) {
        self.lock().link = Some(link);
    }

    /// Whose turn it is; where it is a borrower's, after it is no longer, or at `deadline`.
    pub(super) fn wait(&self, deadline: Instant) -> Turn<L, E> {
        let mut state = self.lock();
        loop {
            if state.ended.is_some()
                && let (Some(link), Some(ended)) = (state.link.take(), state.ended.take())
            {
                return Turn::Over(link, ended);
            }
            if self.loan.load(Acquire) == KEEPER {
                return Turn::Receive;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Turn::Nothing;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What the keeper does with the connection, an error being its end. `None`: that, or it is not its turn.
    pub(super) fn receive<T>(&self, receive: impl FnOnce(&mut L) -> Result<T, E>) -> Option<T> {
        let mut state = self.lock();
        if self.loan.load(Acquire) == KEEPER {
            self.apply(&mut state, receive)
        } else {
            None
        }
    }

    /// The same, whosever turn it is. What is done neither takes anything from the connection nor hands anything on.
    pub(super) fn look_after<T>(&self, look: impl FnOnce(&mut L) -> Result<T, E>) -> Option<T> {
        self.apply(&mut self.lock(), look)
    }

    /// Borrows the connection, of which `of` answers what the borrower needs to know. `None`: there is none, it is borrowed, or
    /// the keeper has it in hand.
    pub(super) fn borrow<T>(&self, of: impl FnOnce(&L) -> T) -> Option<(Loan, T)> {
        let mut state = self.try_lock()?;
        if state.ended.is_some() || self.loan.load(Acquire) != KEEPER {
            return None;
        }
        let known = state.link.as_ref().map(of)?;
        state.loans += 1;
        self.loan.store(state.loans, Release);
        Some((Loan(state.loans), known))
    }

    /// What a borrower does with the connection, an error being its end. `None`: it is over.
    pub(super) fn receive_on<T>(
        &self,
        loan: &Loan,
        receive: impl FnOnce(&mut L) -> Result<T, E>,
    ) -> Option<T> {
        let mut state = self.of_borrower(loan)?;
        let result = self.apply(&mut state, receive);
        if result.is_none() {
            drop(state);
            self.changed.notify_all();
        }
        result
    }

    /// Gives the connection back to its keeper.
    pub(super) fn give_back(&self, loan: &Loan) {
        if let Some(state) = self.of_borrower(loan) {
            self.loan.store(KEEPER, Release);
            drop(state);
            self.changed.notify_all();
        }
    }

    /// If it still is this borrower's. As long as it is, the keeper has the lock to look after the connection alone, which takes
    /// no time.
    fn of_borrower(&self, loan: &Loan) -> Option<MutexGuard<'_, State<L, E>>> {
        while self.loan.load(Acquire) == loan.0 {
            if let Some(state) = self.try_lock() {
                return (self.loan.load(Acquire) == loan.0).then_some(state);
            }
            thread::yield_now();
        }
        None
    }

    fn apply<T>(&self, state: &mut State<L, E>, work: impl FnOnce(&mut L) -> Result<T, E>) -> Option<T> {
        if state.ended.is_some() {
            return None;
        }
        match work(state.link.as_mut()?) {
            Ok(result) => Some(result),
            Err(ended) => {
                state.ended = Some(ended);
                self.loan.store(KEEPER, Release);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Put,
        Wait,
        Borrow,
        /// By the keeper; false: the connection ends.
        Receive(bool),
        LookAfter(bool),
        /// By one of the borrowers there were, counted from the newest.
        ReceiveOn(usize, bool),
        GiveBack(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let well = prop::bool::weighted(0.8);
        prop_oneof![
            Just(Step::Put),
            Just(Step::Wait),
            Just(Step::Borrow),
            well.prop_map(Step::Receive),
            well.prop_map(Step::LookAfter),
            (0..3_usize, well).prop_map(|(borrower, well)| Step::ReceiveOn(borrower, well)),
            (0..3_usize).prop_map(Step::GiveBack),
        ]
    }

    /// What the diagram says, of the connection with a number.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Model {
        Nobody,
        Keeper(u32),
        Borrowed(u32, usize),
        Ended(u32),
    }

    proptest! {
        /// Whatever keeper and borrowers do, in whatever order: one of them receives, a connection ends once, and who borrowed it
        /// once has no more to do with it afterwards.
        #[test]
        fn one_receives(steps in prop::collection::vec(step(), 1..200)) {
            let reception: Reception<u32, &str> = Reception::new();
            let (mut model, mut number) = (Model::Nobody, 0);
            let mut loans: Vec<Loan> = Vec::new();
            let end = |well: bool| if well { Ok(()) } else { Err("the end") };
            for step in steps {
                match step {
                    // A keeper makes a connection when it has none.
                    Step::Put if model == Model::Nobody => {
                        number += 1;
                        reception.put(number);
                        model = Model::Keeper(number);
                    }
                    Step::Put => {}
                    Step::Wait if model == Model::Nobody => {}
                    Step::Wait => {
                        let expected = match model {
                            Model::Ended(link) => Turn::Over(link, "the end"),
                            Model::Borrowed(..) => Turn::Nothing,
                            _ => Turn::Receive,
                        };
                        prop_assert_eq!(reception.wait(Instant::now()), expected);
                        if let Model::Ended(_) = model {
                            model = Model::Nobody;
                        }
                    }
                    Step::Borrow => {
                        let borrowed = reception.borrow(|link| *link);
                        prop_assert_eq!(borrowed.is_some(), matches!(model, Model::Keeper(_)));
                        if let Some((loan, link)) = borrowed {
                            prop_assert_eq!(model, Model::Keeper(link));
                            model = Model::Borrowed(link, loans.len());
                            loans.push(loan);
                        }
                    }
                    Step::Receive(well) => {
                        let mut seen = None;
                        let result = reception.receive(|link| { seen = Some(*link); end(well) });
                        if let Model::Keeper(link) = model {
                            prop_assert_eq!(seen, Some(link));
                            prop_assert_eq!(result.is_some(), well);
                            if !well {
                                model = Model::Ended(link);
                            }
                        } else {
                            prop_assert_eq!((seen, result), (None, None));
                        }
                    }
                    Step::LookAfter(well) => {
                        let result = reception.look_after(|_| end(well));
                        match model {
                            Model::Keeper(link) | Model::Borrowed(link, _) => {
                                prop_assert_eq!(result.is_some(), well);
                                if !well {
                                    model = Model::Ended(link);
                                }
                            }
                            _ => prop_assert_eq!(result, None),
                        }
                    }
                    Step::ReceiveOn(borrower, well) => {
                        let Some(borrower) = loans.len().checked_sub(borrower + 1) else { continue };
                        let mut seen = None;
                        let result = reception.receive_on(&loans[borrower], |link| { seen = Some(*link); end(well) });
                        match model {
                            Model::Borrowed(link, by) if by == borrower => {
                                prop_assert_eq!(seen, Some(link));
                                prop_assert_eq!(result.is_some(), well);
                                if !well {
                                    model = Model::Ended(link);
                                }
                            }
                            _ => prop_assert_eq!((seen, result), (None, None)),
                        }
                    }
                    Step::GiveBack(borrower) => {
                        let Some(borrower) = loans.len().checked_sub(borrower + 1) else { continue };
                        reception.give_back(&loans[borrower]);
                        if let Model::Borrowed(link, by) = model && by == borrower {
                            model = Model::Keeper(link);
                        }
                    }
                }
            }
        }
    }

    /// A keeper that hands something on may be waiting for who would borrow, who does not wait for it.
    #[test]
    fn a_borrower_does_not_wait_for_the_keeper() {
        let reception: Reception<u32, ()> = Reception::new();
        reception.put(1);
        let (old, ()) = reception.borrow(|_| ()).unwrap();
        reception.look_after(|_| Err::<(), ()>(()));
        assert_eq!(reception.wait(Instant::now()), Turn::Over(1, ()));
        reception.put(2);
        let received = reception.receive(|_| {
            thread::scope(|scope| {
                let borrower = scope.spawn(|| {
                    assert!(reception.borrow(|_| ()).is_none());
                    assert!(reception.receive_on(&old, |_| Ok(())).is_none());
                    reception.give_back(&old);
                });
                borrower.join().unwrap();
            });
            Ok(())
        });
        assert_eq!(received, Some(()));
    }

    #[test]
    fn the_keeper_waits_until_it_is_given_back_or_over() {
        for well in [true, false] {
            let reception: Reception<u32, ()> = Reception::new();
            reception.put(1);
            let (loan, ()) = reception.borrow(|_| ()).unwrap();
            let far = Instant::now() + std::time::Duration::from_mins(1);
            let turn = thread::scope(|scope| {
                let keeper = scope.spawn(|| reception.wait(far));
                if well {
                    reception.give_back(&loan);
                } else {
                    reception.receive_on(&loan, |_| Err::<(), ()>(()));
                }
                keeper.join().unwrap()
            });
            assert_eq!(turn, if well { Turn::Receive } else { Turn::Over(1, ()) });
        }
    }
}
