//! Who answers next: at most as many threads at a time as there are processors, and of those that wait the one whose client
//! has had least.
//!
//! A turn is for one step: one frame of at most 256 KiB. Nobody keeps one while waiting for a disk or for a client that does
//! not read. Where a turn is free it is taken at the cost of a lock that nobody else wants.
//!
//! Demand has turns of its own. A thread that works for the background lets others go first, so it may keep a turn for long on a
//! busy host, and demand that waited for it would wait for whoever that thread lets go first. Which of two threads with a turn
//! runs is for the kernel to say, which knows that demand is to go first, and lets background starve no more than anything.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};

use super::client::{Client, Peer};
use crate::wire::{ChannelKind, SessionId};

/// Pages that somebody waits for, and everything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Demand,
    Background,
}

impl From<ChannelKind> for Class {
    fn from(kind: ChannelKind) -> Self {
        match kind {
            ChannelKind::Demand => Self::Demand,
            ChannelKind::Background | ChannelKind::Control => Self::Background,
        }
    }
}

/// The order of turns, for whoever a `T` stands for. No threads, no clocks.
///
/// Turns are shared equally between peers, those of a peer equally between its sessions, and those of a session are given in
/// the order in which its channels asked. Somebody who was away has not saved anything up: he comes back as one who has had as
/// much as the one who was served last.
#[derive(Debug)]
struct Order<T> {
    /// Turns that nobody has. If there is one, nobody waits.
    free: usize,
    /// Numbers those who wait, so that of equals the first comes first.
    next: u64,
    waiting: usize,
    /// What the peer who was served last had had.
    now: u64,
    peers: HashMap<Peer, PeerLine<T>>,
}

#[derive(Debug)]
struct PeerLine<T> {
    state: PeerState,
    sessions: HashMap<SessionId, SessionLine<T>>,
}

#[derive(Debug)]
struct PeerState {
    waiting: usize,
    had: u64,
    /// What the session that was served last had had.
    now: u64,
}

#[derive(Debug)]
struct SessionLine<T> {
    /// Open channels.
    channels: usize,
    had: u64,
    waiting: VecDeque<(u64, T)>,
}

impl<T> Order<T> {
    fn new(turns: usize) -> Self {
        Self {
            free: turns,
            next: 0,
            waiting: 0,
            now: 0,
            peers: HashMap::new(),
        }
    }

    /// A channel was opened.
    fn join(&mut self, client: Client) {
        self.entry(client).1.channels += 1;
    }

    /// A channel was closed, which does not wait.
    fn leave(&mut self, client: Client) {
        let Some(peer) = self.peers.get_mut(&client.peer) else {
            return;
        };
        if let Some(session) = peer.sessions.get_mut(&client.session) {
            session.channels -= 1;
            if session.channels == 0 {
                peer.sessions.remove(&client.session);
            }
        }
        if peer.sessions.is_empty() {
            self.peers.remove(&client.peer);
        }
    }

    /// Asks for a turn. True: here it is; else `who` is told later. The channel has joined.
    fn ask(&mut self, client: Client, who: impl FnOnce() -> T) -> bool {
        if self.free > 0 {
            self.free -= 1;
            return true;
        }
        let number = self.next;
        self.next += 1;
        self.push(client, number, who());
        false
    }

    /// For who has a turn and would like another. `None`: nobody else would; else it is that one's, who may be the same.
    fn pass(&mut self, client: Client, who: impl FnOnce() -> T) -> Option<T> {
        if self.waiting == 0 {
            return None;
        }
        let number = self.next;
        self.next += 1;
        self.push(client, number, who());
        self.pop()
    }

    /// Gives a turn back. Who is answered has it now.
    fn give_back(&mut self) -> Option<T> {
        let next = self.pop();
        if next.is_none() {
            self.free += 1;
        }
        next
    }

    /// Those lines of a client, new ones if it had none.
    fn entry(&mut self, client: Client) -> (&mut PeerState, &mut SessionLine<T>) {
        let now = self.now;
        let peer = self.peers.entry(client.peer).or_insert_with(|| PeerLine {
            state: PeerState {
                waiting: 0,
                had: now,
                now: 0,
            },
            sessions: HashMap::new(),
        });
        let now = peer.state.now;
        let session = peer
            .sessions
            .entry(client.session)
            .or_insert_with(|| SessionLine {
                channels: 0,
                had: now,
                waiting: VecDeque::new(),
            });
        (&mut peer.state, session)
    }

    fn push(&mut self, client: Client, number: u64, who: T) {
        let now = self.now;
        let (peer, session) = self.entry(client);
        if peer.waiting == 0 {
            peer.had = peer.had.max(now);
        }
        if session.waiting.is_empty() {
            session.had = session.had.max(peer.now);
        }
        session.waiting.push_back((number, who));
        peer.waiting += 1;
        self.waiting += 1;
    }

    fn pop(&mut self) -> Option<T> {
        // A search through all who wait, of whom there are no more than channels: a step takes much longer.
        let peer = self
            .peers
            .values_mut()
            .filter(|peer| peer.state.waiting > 0)
            .min_by_key(|peer| (peer.state.had, peer.first()))?;
        let PeerLine { state, sessions } = peer;
        let session = sessions
            .values_mut()
            .filter(|session| !session.waiting.is_empty())
            .min_by_key(|session| (session.had, session.first()))?;
        let (_, who) = session.waiting.pop_front()?;
        self.now = state.had;
        state.now = session.had;
        state.had += 1;
        session.had += 1;
        state.waiting -= 1;
        self.waiting -= 1;
        Some(who)
    }
}

impl<T> PeerLine<T> {
    fn first(&self) -> Option<u64> {
        self.sessions.values().filter_map(SessionLine::first).min()
    }
}

impl<T> SessionLine<T> {
    fn first(&self) -> Option<u64> {
        self.waiting.front().map(|(number, _)| *number)
    }
}

type Orders = Mutex<Order<Arc<Waiter>>>;

/// The turns of a server's threads.
#[derive(Debug)]
pub(super) struct Turns {
    demand: Orders,
    background: Orders,
    waits: AtomicU64,
}

/// A thread that waits for its turn.
#[derive(Debug)]
struct Waiter {
    thread: Thread,
    called: AtomicBool,
}

impl Turns {
    pub(super) fn new(turns: usize) -> Self {
        Self {
            demand: Mutex::new(Order::new(turns)),
            background: Mutex::new(Order::new(turns)),
            waits: AtomicU64::new(0),
        }
    }

    /// A place for a channel that is served by the calling thread.
    pub(super) fn join(&self, kind: ChannelKind, client: Client) -> Place<'_> {
        let class = kind.into();
        self.lock(class).join(client);
        let waiter = Arc::new(Waiter {
            thread: thread::current(),
            called: AtomicBool::new(false),
        });
        Place {
            turns: self,
            class,
            client,
            waiter,
            has_turn: false,
        }
    }

    /// Who waits at this moment.
    pub(super) fn waiting(&self) -> [(Class, usize); 2] {
        [Class::Demand, Class::Background].map(|class| (class, self.lock(class).waiting))
    }

    /// How often somebody had to wait so far.
    pub(super) fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    fn lock(&self, class: Class) -> MutexGuard<'_, Order<Arc<Waiter>>> {
        let order = match class {
            Class::Demand => &self.demand,
            Class::Background => &self.background,
        };
        order.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A channel's place in the order.
#[derive(Debug)]
pub(super) struct Place<'a> {
    turns: &'a Turns,
    class: Class,
    client: Client,
    waiter: Arc<Waiter>,
    has_turn: bool,
}

impl Place<'_> {
    /// Waits for a turn; one that it has goes to whoever is next, which may be this one again.
    pub(super) fn take(&mut self) {
        let who = || Arc::clone(&self.waiter);
        let next = {
            let mut order = self.turns.lock(self.class);
            if self.has_turn {
                // In one go: who asks again only later would find all turns taken by those who wait already.
                match order.pass(self.client, who) {
                    Some(next) => Some(next),
                    None => return,
                }
            } else if order.ask(self.client, who) {
                self.has_turn = true;
                return;
            } else {
                None
            }
        };
        call(next);
        self.wait();
        self.has_turn = true;
    }

    pub(super) fn has_turn(&self) -> bool {
        self.has_turn
    }

    /// Lets somebody else go on.
    pub(super) fn give_back(&mut self) {
        if self.has_turn {
            self.has_turn = false;
            let next = self.turns.lock(self.class).give_back();
            call(next);
        }
    }

    /// Does something that waits, without a turn meanwhile.
    pub(super) fn without<R>(&mut self, wait: impl FnOnce() -> R) -> R {
        self.give_back();
        let result = wait();
        self.take();
        result
    }

    fn wait(&self) {
        // Called by itself, if it is next.
        if self.waiter.called.swap(false, Ordering::Acquire) {
            return;
        }
        self.turns.waits.fetch_add(1, Ordering::Relaxed);
        while !self.waiter.called.swap(false, Ordering::Acquire) {
            thread::park();
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.give_back();
        self.turns.lock(self.class).leave(self.client);
    }
}

fn call(next: Option<Arc<Waiter>>) {
    if let Some(waiter) = next {
        waiter.called.store(true, Ordering::Release);
        waiter.thread.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicUsize;

    fn client(peer: u32, session: u8) -> Client {
        Client {
            peer: Peer::Process(peer),
            session: SessionId([session; 16]),
        }
    }

    /// An order in which all turns are taken.
    fn busy() -> Order<&'static str> {
        let mut order = Order::new(1);
        assert!(order.ask(client(0, 0), || "first"));
        order
    }

    fn ask(order: &mut Order<&'static str>, client: Client, who: &'static str) {
        assert!(!order.ask(client, || who));
    }

    fn all(order: &mut Order<&'static str>) -> Vec<&'static str> {
        std::iter::from_fn(|| order.give_back()).collect()
    }

    #[test]
    fn one_channel_is_served_as_often_as_sixteen() {
        let mut order = busy();
        for _ in 0..16 {
            ask(&mut order, client(1, 1), "greedy");
        }
        ask(&mut order, client(2, 1), "modest");
        assert_eq!(order.give_back(), Some("greedy"));
        assert_eq!(order.give_back(), Some("modest"));
        // From here on each that is served asks again at once.
        let mut had = HashMap::from([("greedy", 0), ("modest", 0)]);
        let mut now = ("modest", client(2, 1));
        for _ in 0..100 {
            let next = order.pass(now.1, || now.0).unwrap();
            now = (next, client(if next == "greedy" { 1 } else { 2 }, 1));
            *had.get_mut(next).unwrap() += 1;
        }
        assert_eq!(had, HashMap::from([("greedy", 50), ("modest", 50)]));
    }

    #[test]
    fn many_sessions_of_a_peer_are_one_peer() {
        let mut order = busy();
        for session in 0..16 {
            ask(&mut order, client(1, session), "greedy");
        }
        ask(&mut order, client(2, 1), "modest");
        ask(&mut order, client(2, 1), "modest");
        let begin = ["greedy", "modest", "greedy", "modest", "greedy", "greedy"];
        assert_eq!(all(&mut order)[..6], begin);
    }

    #[test]
    fn sessions_of_a_peer_share_equally_too() {
        let mut order = busy();
        for _ in 0..4 {
            ask(&mut order, client(1, 1), "a");
        }
        for _ in 0..2 {
            ask(&mut order, client(1, 2), "b");
        }
        assert_eq!(all(&mut order), ["a", "b", "a", "b", "a", "a"]);
    }

    /// However many turns background has, and whether it ever gives one back.
    #[test]
    fn demand_does_not_wait_for_background() {
        let turns = Turns::new(1);
        let mut background = turns.join(ChannelKind::Background, client(1, 1));
        background.take();
        let mut demand = turns.join(ChannelKind::Demand, client(2, 1));
        demand.take();
        assert!(background.has_turn() && demand.has_turn());
        assert_eq!(turns.waits(), 0);
    }

    #[test]
    fn who_was_away_has_saved_nothing_up() {
        let mut order = busy();
        order.join(client(2, 1));
        for _ in 0..20 {
            ask(&mut order, client(1, 1), "here");
        }
        for _ in 0..10 {
            assert_eq!(order.give_back(), Some("here"));
        }
        for _ in 0..5 {
            ask(&mut order, client(2, 1), "back");
        }
        assert_eq!(
            all(&mut order)[..6],
            ["back", "here", "back", "here", "back", "here"]
        );
    }

    #[test]
    fn nothing_is_kept_of_who_has_left() {
        let mut order = busy();
        for peer in 0..100 {
            order.join(client(peer, 1));
            ask(&mut order, client(peer, 1), "");
            assert_eq!(order.give_back(), Some(""));
            order.leave(client(peer, 1));
        }
        assert!(order.peers.is_empty());
    }

    /// What a channel of the model does.
    #[derive(Clone, Copy, Debug)]
    enum Action {
        Ask,
        GiveBack,
        Pass,
    }

    proptest! {
        /// There are never more turns than there are, none is lost, nobody waits while one is free, and of two peers that
        /// wait all the time neither is served more than once more often than the other.
        #[test]
        fn turns_are_neither_lost_nor_doubled(
            turns in 1usize..4,
            actions in prop::collection::vec(
                (0usize..12, prop_oneof![Just(Action::Ask), Just(Action::GiveBack), Just(Action::Pass)]), 1..400)
        ) {
            let of = |channel: usize| client(channel as u32 % 3, (channel % 4) as u8);
            let mut order = Order::new(turns);
            for channel in 0..12 {
                order.join(of(channel));
            }
            let (mut has, mut waits) = ([false; 12], [false; 12]);
            for (channel, action) in actions {
                let client = of(channel);
                let next = match action {
                    Action::Ask if !has[channel] && !waits[channel] => {
                        has[channel] = order.ask(client, || channel);
                        waits[channel] = !has[channel];
                        None
                    }
                    Action::GiveBack if has[channel] => {
                        has[channel] = false;
                        order.give_back()
                    }
                    Action::Pass if has[channel] => {
                        let next = order.pass(client, || channel);
                        if next.is_some() {
                            (has[channel], waits[channel]) = (false, true);
                        }
                        next
                    }
                    _ => None,
                };
                if let Some(next) = next {
                    prop_assert!(waits[next]);
                    (has[next], waits[next]) = (true, false);
                }
                let count = |flags: &[bool]| flags.iter().filter(|flag| **flag).count();
                prop_assert_eq!(count(&has) + order.free, turns);
                prop_assert_eq!(count(&waits), order.waiting);
                prop_assert!(order.free == 0 || order.waiting == 0);
            }
        }

        #[test]
        fn peers_that_always_wait_are_served_equally(channels in prop::collection::vec(1usize..8, 2..6), rounds in 1usize..50) {
            let mut order = Order::new(1);
            assert!(order.ask(client(99, 0), || 99));
            for (peer, channels) in channels.iter().enumerate() {
                for channel in 0..*channels {
                    let client = client(peer as u32, channel as u8 % 2);
                    order.join(client);
                    // Two of each, so that it waits even while it is served.
                    order.ask(client, || peer);
                    order.ask(client, || peer);
                }
            }
            let mut served = vec![0; channels.len()];
            for _ in 0..rounds {
                let peer = order.give_back().unwrap();
                served[peer] += 1;
                order.ask(client(peer as u32, 0), || peer);
                let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
                prop_assert!(most - least <= 1, "{:?}", served);
            }
        }
    }

    #[test]
    fn threads_get_their_turns_and_no_more_than_there_are() {
        let turns = Turns::new(2);
        let inside = AtomicUsize::new(0);
        thread::scope(|scope| {
            for number in 0..8 {
                let (turns, inside) = (&turns, &inside);
                scope.spawn(move || {
                    let mut place = turns.join(ChannelKind::Demand, client(number / 3, 0));
                    for round in 0..2000 {
                        place.take();
                        assert!(inside.fetch_add(1, Ordering::SeqCst) < 2);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        if round % 3 == 0 {
                            place.without(|| ());
                        }
                        if round % 5 == 0 {
                            place.give_back();
                        }
                    }
                });
            }
        });
        assert_eq!(turns.lock(Class::Demand).free, 2);
        assert_eq!(turns.waiting(), [(Class::Demand, 0), (Class::Background, 0)]);
    }
}
