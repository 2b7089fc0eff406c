//! Renews the leases of all attempts of this process, many in one statement.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    error::StoreError,
    node::{running::Running, tasks::Tasks},
    redact::{TRACING_TARGET, subscribed},
    store::Store,
    stored::record::{Attempt, AttemptId, RenewOutcome, Renewal},
};

/// Keeps the leases of this process alive. Its task runs while there are any.
#[derive(Debug)]
pub(crate) struct Renewer {
    store: Arc<dyn Store>,
    tasks: Tasks,
    running: Arc<Running>,
    state: Mutex<State>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct State {
    leases: HashMap<AttemptId, Entry>,
    task_runs: bool,
    next: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    renewal: Renewal,
    interval: Duration,
    due: Instant,
    lost: CancellationToken,
}

impl Renewer {
    pub(crate) fn new(store: Arc<dyn Store>, tasks: Tasks, running: Arc<Running>) -> Arc<Self> {
        Arc::new(Self { store, tasks, running, state: Mutex::default(), wake: Notify::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(self: &Arc<Self>, entry: Entry) {
        let mut state = self.state();
        let due = entry.due;
        state.leases.insert(entry.renewal.attempt.id, entry);
        if !state.task_runs {
            state.task_runs = true;
            // Made outside of the task: a runtime that shuts down may drop the task before its first poll.
            let task = RenewalTask { renewer: Arc::clone(self), ended: false };
            tokio::spawn(subscribed(task.run()));
        } else if state.next.is_none_or(|next| due < next) {
            // The task sleeps until `next`. If it is not sleeping yet, `notify_one` leaves a permit.
            self.wake.notify_one();
        }
    }

    /// Stops renewing the lease of an attempt.
    pub(crate) fn leave(&self, attempt: AttemptId) {
        self.state().leases.remove(&attempt);
    }

    /// Ends the task, which keeps the store alive, if there is no lease.
    pub(crate) fn end_if_idle(&self) {
        self.wake.notify_one();
    }

    /// When the next lease is due. `None` ends the task: there is no lease.
    fn next_due(&self) -> Option<Instant> {
        let mut state = self.state();
        state.next = state.leases.values().map(|entry| entry.due).min();
        // Under the same lock as `add`: a lease added from now on starts a new task.
        state.task_runs = state.next.is_some();
        state.next
    }

    /// Takes the renewals that are due, or soon will be. Each is due again after another interval,
    /// whatever becomes of this one.
    fn take_due(&self) -> Vec<Renewal> {
        let now = Instant::now();
        let mut state = self.state();
        let due = state.leases.values_mut().filter(|entry| entry.due <= now + entry.interval / 8);
        due.map(|entry| {
            // Set before the answer: a call that hangs must not stop the next try.
            entry.due = now + entry.interval;
            entry.renewal.clone()
        })
        .collect()
    }

    async fn renew(self: Arc<Self>, batch: Vec<Renewal>) {
        let started = Instant::now();
        // Half of the shortest lease, so that a second try still comes in time.
        let limit = batch.iter().map(|renewal| renewal.lease).min().unwrap_or_default() / 2;
        match self.ask(batch.clone(), limit).await {
            Ok(outcomes) => self.note(&batch, &outcomes, started),
            Err(error) => {
                tracing::warn!(
                    target: TRACING_TARGET, error = &error as &dyn std::error::Error, leases = batch.len(),
                    "leases could not be renewed; trying again"
                );
                self.try_again(&batch);
            }
        }
    }

    /// Makes renewals that failed due again in a quarter of their interval.
    fn try_again(&self, batch: &[Renewal]) {
        let now = Instant::now();
        let mut state = self.state();
        for renewal in batch {
            if let Some(entry) = state.leases.get_mut(&renewal.attempt.id) {
                entry.due = entry.due.min(now + entry.interval / 4);
            }
        }
        drop(state);
        self.wake.notify_one();
    }

    /// Asks the store in a task that goes on when it takes longer than `limit`.
    async fn ask(&self, batch: Vec<Renewal>, limit: Duration) -> Result<Vec<RenewOutcome>, StoreError> {
        let store = Arc::clone(&self.store);
        self.tasks.call(limit, async move { store.renew(&batch).await }).await
    }

    fn note(&self, batch: &[Renewal], outcomes: &[RenewOutcome], started: Instant) {
        let mut state = self.state();
        for (renewal, outcome) in batch.iter().zip(outcomes) {
            // Its attempt has ended while the call was under way.
            let Some(entry) = state.leases.get_mut(&renewal.attempt.id) else { continue };
            // A row that is locked, for example by a transaction of its handler, may be unlocked
            // with an old lease.
            let wait = if *outcome == RenewOutcome::Skipped { entry.interval / 4 } else { entry.interval };
            // From the start of the call: the store may have renewed at any moment since.
            entry.due = started + wait;
            if *outcome == RenewOutcome::Lost {
                entry.lost.cancel();
                state.leases.remove(&renewal.attempt.id);
                let attempt = &renewal.attempt;
                // The record may have a new owner elsewhere: a duplicate must ask the store again.
                self.running.leave(attempt);
                tracing::warn!(
                    target: TRACING_TARGET, consumer = %attempt.consumer, attempt = %attempt.id,
                    "lease lost: another attempt or an operator has taken the record over"
                );
            }
        }
    }
}

/// The task. If its runtime goes down, the next attempt, on another runtime, must be able to start
/// another.
struct RenewalTask {
    renewer: Arc<Renewer>,
    ended: bool,
}

impl RenewalTask {
    async fn run(mut self) {
        while let Some(next) = self.renewer.next_due() {
            let _ = timeout_at(next, self.renewer.wake.notified()).await;
            for batch in self.renewer.take_due().chunks(MAX_BATCH) {
                // In a task of its own: a call that hangs must not delay the others.
                tokio::spawn(subscribed(Arc::clone(&self.renewer).renew(batch.to_vec())));
            }
        }
        // `next_due` has cleared the flag, which may be a newer task's by now.
        self.ended = true;
    }
}

impl Drop for RenewalTask {
    fn drop(&mut self) {
        if !self.ended {
            self.renewer.state().task_runs = false;
        }
    }
}

/// The lease of one attempt. It is renewed from [`renew_after`](Self::renew_after) to
/// [`leave`](Self::leave), or until it is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    renewer: Arc<Renewer>,
    renewal: Renewal,
    interval: Duration,
    lost: CancellationToken,
}

impl Lease {
    pub(crate) fn new(
        renewer: &Arc<Renewer>,
        attempt: Attempt,
        duration: Duration,
        interval: Duration,
        lost: CancellationToken,
    ) -> Self {
        Self { renewer: Arc::clone(renewer), renewal: Renewal::new(attempt, duration), interval, lost }
    }

    /// Starts to renew, the first time after `delay`.
    pub(crate) fn renew_after(&self, delay: Duration) {
        self.renewer.add(Entry {
            renewal: self.renewal.clone(),
            interval: self.interval,
            due: Instant::now() + delay,
            lost: self.lost.clone(),
        });
    }

    /// Stops renewing. The lease then runs to its end.
    pub(crate) fn leave(&self) {
        self.renewer.leave(self.renewal.attempt.id);
    }

    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.leave();
    }
}

/// The part of a lease in which its attempt surely owns the record. Near its end another attempt
/// may run before it is renewed.
pub(crate) fn usable(lease: Duration) -> Duration {
    lease * 3 / 4
}

/// The number of leases that one call of the store renews.
const MAX_BATCH: usize = 500;
