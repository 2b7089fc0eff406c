//! Groups: calls that arrive while a statement is under way share the next statement.
//!
//! A call that finds no statement under way runs its own immediately. The others wait. When the
//! statement ends, one of those that wait leads: it runs one statement for all of them and hands
//! each its outcome. So there is no task that could be gone, and no delay that a lonely call pays.
//!
//! Nothing waits for a leader that is gone: its group takes the direct path. Nothing waits for a
//! statement that hangs either: after [`PATIENCE`] a statement no longer counts, and one of those
//! that wait leads the next group beside it. The connections of the store bound their number.

use std::{
    collections::{HashMap, HashSet},
    fmt::{self, Debug},
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};

use super::grouped::{Completion, Release};
use crate::{
    consumer::Consumer,
    error::{StoreError, StoreErrorKind},
    metrics,
    redact::TRACING_TARGET,
    stored::record::{Attempt, Claim},
};

/// Grouping of calls that arrive simultaneously.
///
/// Claims, completions and releases that arrive while an earlier statement is under way share the
/// next one: one round trip and one flush for all of them. A call that arrives alone is sent
/// immediately. Default: at most 64 calls and 1 MiB of responses in a statement.
///
/// A failing group harms none of its calls: each of them is then sent alone.
///
/// ```
/// use tower_idempotency::store::Grouping;
///
/// let small = Grouping::with_max_rows(16);
/// # let _ = small;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grouping {
    max_rows: usize,
}

impl Grouping {
    /// Sends each call alone.
    #[must_use]
    pub fn off() -> Self {
        Self { max_rows: 0 }
    }

    /// Sets the number of calls in a statement, 1 to 1,000. With 1, each call is a group of its
    /// own, even one that arrives alone: tests reach the statements of groups in this way.
    #[must_use]
    pub fn with_max_rows(rows: u16) -> Self {
        Self { max_rows: usize::from(rows.clamp(1, MOST_ROWS)) }
    }
}

impl Default for Grouping {
    fn default() -> Self {
        Self { max_rows: DEFAULT_ROWS }
    }
}

/// A call that can share a statement. It may be repeated: its attempt fences it.
pub(in crate::store) trait Item: Clone + Debug + Send + 'static {
    const OPERATION: &'static str;
    type Outcome: Send + 'static;

    fn attempt(&self) -> &Attempt;

    /// Returns the size of what it stores.
    fn bytes(&self) -> usize;
}

/// The two ways in which an item reaches its database.
pub(in crate::store) trait Grouped<E>: Item {
    fn alone(&self, engine: &E) -> impl Future<Output = Result<Self::Outcome, StoreError>> + Send;

    /// Runs one statement for all items, of which no two have the same key. An item without an
    /// outcome goes alone.
    fn together(items: &[Self], engine: &E) -> impl Future<Output = Together<Self::Outcome>> + Send;
}

pub(in crate::store) type Together<O> = Result<Vec<Option<O>>, StoreError>;

/// The groups of a store. Calls of one kind do not wait for those of another.
#[derive(Debug, Default)]
pub(in crate::store) struct Groups {
    pub(super) claims: Group<Claim>,
    pub(super) completions: Group<Completion>,
    pub(super) releases: Group<Release>,
    calls: Mutex<TaskTracker>,
}

impl Groups {
    /// Marks a call as under way.
    pub(super) fn begin(&self) -> TaskTrackerToken {
        self.calls().token()
    }

    /// Waits for the calls that are under way, those in a queue included. Later ones do not count.
    pub(super) async fn idle(&self) {
        let calls = mem::take(&mut *self.calls());
        calls.close();
        calls.wait().await;
    }

    fn calls(&self) -> MutexGuard<'_, TaskTracker> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The calls of one kind.
pub(in crate::store) struct Group<T: Item>(Arc<Mutex<Queue<T>>>);

struct Queue<T: Item> {
    /// In the order of their arrival.
    waiting: Vec<Waiter<T>>,
    /// The statement that was begun last, unless it has ended.
    newest: Option<(u64, Instant)>,
    /// Counts waiters and statements, to name them.
    count: u64,
}

struct Waiter<T: Item> {
    number: u64,
    item: T,
    caller: Caller<T>,
}

/// The way to a call that waits.
struct Caller<T: Item> {
    turn: oneshot::Sender<Turn<T>>,
    /// Its statement has begun.
    begun: Arc<AtomicBool>,
}

/// A call that waits.
struct Waiting<T: Item> {
    number: u64,
    turn: oneshot::Receiver<Turn<T>>,
    begun: Arc<AtomicBool>,
}

/// An end of waiting.
enum Turn<T: Item> {
    Done(Result<T::Outcome, StoreError>),
    Alone,
    Lead(Batch<T>),
}

/// The place of a call that arrives.
enum Place<T: Item> {
    Direct(Option<UnderWay<T>>),
    Lead(Batch<T>),
    Wait(Waiting<T>),
}

/// The items of one statement. If it is dropped, their callers take the direct path.
struct Batch<T: Item> {
    items: Vec<T>,
    /// The callers of the items. `None` for the one that leads.
    callers: Vec<Option<Caller<T>>>,
    under_way: UnderWay<T>,
}

/// A statement that is under way. When it is dropped, those that wait are led.
struct UnderWay<T: Item> {
    queue: Arc<Mutex<Queue<T>>>,
    number: u64,
    max_rows: usize,
}

impl<T: Item> Group<T> {
    /// Runs an item, alone or in a group.
    pub(super) async fn run<E>(
        &self,
        grouping: Grouping,
        item: T,
        engine: &E,
    ) -> Result<T::Outcome, StoreError>
    where
        T: Grouped<E>,
    {
        let turn = match self.enter(grouping.max_rows, &item) {
            Place::Direct(_under_way) => return item.alone(engine).await,
            Place::Lead(batch) => Turn::Lead(batch),
            Place::Wait(waiting) => self.wait(grouping.max_rows, waiting).await,
        };
        let turn = match turn {
            Turn::Lead(batch) => batch.run(engine).await,
            turn @ (Turn::Done(_) | Turn::Alone) => turn,
        };
        match turn {
            Turn::Done(outcome) => outcome,
            Turn::Alone | Turn::Lead(_) => item.alone(engine).await,
        }
    }

    fn enter(&self, max_rows: usize, item: &T) -> Place<T> {
        if max_rows == 0 || item.bytes() > LARGE_BYTES {
            return Place::Direct(None);
        }
        let mut queue = lock(&self.0);
        let free = !queue.is_busy();
        if free && max_rows > 1 {
            return Place::Direct(Some(queue.begin(&self.0, max_rows)));
        }
        let (sender, turn) = oneshot::channel();
        let (number, begun) = (queue.next_number(), Arc::default());
        let caller = Caller { turn: sender, begun: Arc::clone(&begun) };
        queue.waiting.push(Waiter { number, item: item.clone(), caller });
        match free.then(|| queue.lead(&self.0, max_rows, number)).flatten() {
            Some(batch) => Place::Lead(batch),
            None => Place::Wait(Waiting { number, turn, begun }),
        }
    }

    async fn wait(&self, max_rows: usize, mut waiting: Waiting<T>) -> Turn<T> {
        for _ in 0..2 {
            if let Ok(turn) = timeout(PATIENCE, &mut waiting.turn).await {
                return turn.unwrap_or(Turn::Alone);
            }
            // The statement before this one takes long.
            if let Some(batch) = self.lead(max_rows, waiting.number) {
                return Turn::Lead(batch);
            }
            // The statement of its group has a time-out.
            if waiting.begun.load(Ordering::Acquire) {
                return waiting.turn.await.unwrap_or(Turn::Alone);
            }
        }
        // The task of the leader does not run.
        Turn::Alone
    }

    fn lead(&self, max_rows: usize, number: u64) -> Option<Batch<T>> {
        lock(&self.0).lead(&self.0, max_rows, number)
    }
}

impl<T: Item> Queue<T> {
    /// Returns `true` while the newest statement is young enough to wait for.
    fn is_busy(&self) -> bool {
        self.newest.is_some_and(|(_, begun)| begun.elapsed() < PATIENCE)
    }

    fn next_number(&mut self) -> u64 {
        self.count += 1;
        self.count
    }

    fn begin(&mut self, queue: &Arc<Mutex<Self>>, max_rows: usize) -> UnderWay<T> {
        let number = self.next_number();
        self.newest = Some((number, Instant::now()));
        UnderWay { queue: Arc::clone(queue), number, max_rows }
    }

    /// Takes a group that this waiter leads, if it still waits.
    fn lead(&mut self, queue: &Arc<Mutex<Self>>, max_rows: usize, number: u64) -> Option<Batch<T>> {
        let place = self.waiting.iter().position(|waiter| waiter.number == number)?;
        // The first in the queue is in every group.
        let leader = self.waiting.remove(place);
        self.waiting.insert(0, leader);
        let mut batch = self.take(queue, max_rows)?;
        batch.callers[0] = None;
        Some(batch)
    }

    /// Takes those that wait, as far as there is room. If there is not, each consumer gets its
    /// turn: a storm of one delays no other.
    fn take(&mut self, queue: &Arc<Mutex<Self>>, max_rows: usize) -> Option<Batch<T>> {
        let mut waiting = mem::take(&mut self.waiting);
        waiting.retain(|waiter| !waiter.caller.turn.is_closed());
        if waiting.len() > max_rows {
            waiting = by_turns(waiting);
        }
        let (mut keys, mut bytes) = (HashSet::with_capacity(max_rows.min(waiting.len())), 0);
        let (mut items, mut callers) = (Vec::new(), Vec::new());
        for waiter in waiting {
            let Attempt { consumer, key, .. } = waiter.item.attempt();
            bytes += waiter.item.bytes();
            if items.len() == max_rows || bytes > MAX_BYTES {
                self.waiting.push(waiter);
            } else if keys.insert((consumer.clone(), key.clone())) {
                items.push(waiter.item);
                callers.push(Some(waiter.caller));
            }
            // Another call about the same key is dropped, which sends it on the direct path.
        }
        self.waiting.sort_by_key(|waiter| waiter.number);
        (!items.is_empty()).then(|| Batch { items, callers, under_way: self.begin(queue, max_rows) })
    }
}

/// Sorts waiters so that the first of each consumer come first, then the second, and so on.
fn by_turns<T: Item>(waiting: Vec<Waiter<T>>) -> Vec<Waiter<T>> {
    let mut counts = HashMap::<Consumer, usize>::new();
    let turn = |waiter: Waiter<T>| {
        let count = counts.entry(waiter.item.attempt().consumer.clone()).or_default();
        *count += 1;
        (*count, waiter)
    };
    let mut turns: Vec<_> = waiting.into_iter().map(turn).collect();
    turns.sort_by_key(|(turn, _)| *turn);
    turns.into_iter().map(|(_, waiter)| waiter).collect()
}

impl<T: Item> Batch<T> {
    /// Hands the batch to the first caller that is still there, which leads it.
    fn hand_over(mut self) {
        while let Some(leader) = self.callers.iter().position(Option::is_some) {
            let Some(caller) = self.callers[leader].take() else { return };
            match caller.turn.send(Turn::Lead(self)) {
                Err(Turn::Lead(mut batch)) => {
                    // Its future was dropped.
                    batch.items.remove(leader);
                    batch.callers.remove(leader);
                    self = batch;
                }
                Err(Turn::Done(_) | Turn::Alone) | Ok(()) => return,
            }
        }
    }

    /// Runs the statement, hands the others their outcomes, and returns that of the leader.
    async fn run<E>(self, engine: &E) -> Turn<T>
    where
        T: Grouped<E>,
    {
        let begun = Instant::now();
        for caller in self.callers.iter().flatten() {
            caller.begun.store(true, Ordering::Release);
        }
        let outcomes = T::together(&self.items, engine).await.map_err(Arc::new);
        drop(self.under_way);
        if outcomes.is_ok() {
            metrics::group(T::OPERATION, self.items.len());
        }
        let lost = outcomes.as_ref().err().filter(|error| error.kind() == StoreErrorKind::Ambiguous);
        let lost = lost.map(StoreError::shared);
        let turns = turns(self.items.len(), begun.elapsed(), outcomes);
        let mut own = Turn::Alone;
        for (caller, turn) in self.callers.into_iter().zip(turns) {
            match caller {
                // One that has gone needs no outcome.
                Some(caller) => drop(caller.turn.send(turn)),
                None => own = turn,
            }
        }
        // One caller learns that the connection was lost, even if all succeed on another one.
        lost.map_or(own, |error| Turn::Done(Err(error)))
    }
}

/// Returns the outcomes of a group's items. After an error each item goes alone, so that one bad
/// item harms no other. But if the server has not answered for long, each gets the error: it would
/// wait as long again.
fn turns<T: Item>(
    items: usize,
    elapsed: Duration,
    outcomes: Result<Vec<Option<T::Outcome>>, Arc<StoreError>>,
) -> Vec<Turn<T>> {
    match outcomes {
        Ok(outcomes) => {
            let turn = |outcome: Option<_>| outcome.map_or(Turn::Alone, |outcome| Turn::Done(Ok(outcome)));
            outcomes.into_iter().map(turn).collect()
        }
        Err(error) if error.is_retryable() && elapsed >= LATE => {
            (0..items).map(|_| Turn::Done(Err(StoreError::shared(&error)))).collect()
        }
        Err(error) => {
            tracing::debug!(
                target: TRACING_TARGET, operation = T::OPERATION, items,
                error = &*error as &dyn std::error::Error,
                "a group of calls failed; each of them is repeated alone"
            );
            (0..items).map(|_| Turn::Alone).collect()
        }
    }
}

impl<T: Item> Drop for UnderWay<T> {
    fn drop(&mut self) {
        let mut queue = lock(&self.queue);
        if queue.newest.is_some_and(|(number, _)| number == self.number) {
            queue.newest = None;
        }
        // A younger statement leads those that wait when it ends.
        let next = if queue.is_busy() { None } else { queue.take(&self.queue, self.max_rows) };
        drop(queue);
        if let Some(batch) = next {
            batch.hand_over();
        }
    }
}

fn lock<T: Item>(queue: &Mutex<Queue<T>>) -> MutexGuard<'_, Queue<T>> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T: Item> Default for Group<T> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Queue { waiting: Vec::new(), newest: None, count: 0 })))
    }
}

impl<T: Item> Debug for Group<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} waiting", lock(&self.0).waiting.len())
    }
}

const DEFAULT_ROWS: usize = 64;
const MOST_ROWS: u16 = 1_000;
/// The size of the responses of a group.
const MAX_BYTES: usize = 1024 * 1024;
/// The size of a response that goes alone, because it would delay a group.
const LARGE_BYTES: usize = 64 * 1024;
/// The time after which a statement no longer keeps others waiting. Longer than a flush.
const PATIENCE: Duration = Duration::from_millis(30);
/// The time after which the failure of a group is that of its calls.
const LATE: Duration = Duration::from_secs(1);
