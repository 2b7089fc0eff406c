//! One pass of the reconciler: takes intents, looks them up and records the answers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    attempt::settle::{TURNED_UP, report_turned_up},
    error::{BoxError, StoreError, StoreErrorKind},
    metrics,
    node::Node,
    recovery::reconciler::{Lookup, Reconciler, Settings, TO_RECORD},
    redact::{TRACING_TARGET, subscribed},
    retry::{Backoff, retry_until},
    store::recovery::RecoveryStore,
    stored::{
        intent::{Intent, IntentState, IntentUpdate},
        record::Fenced,
    },
};

/// The number of intents with each outcome in one pass of a [`Reconciler`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReconcilerPass {
    /// Intents that were taken. Those that the pass did not reach are in no other count and are
    /// taken again later.
    pub taken: u64,
    /// Intents whose resource was found: they are finalized.
    pub found: u64,
    /// Intents that were not found twice, or whose call was certainly not sent: the call may be
    /// made again.
    pub absent: u64,
    /// Intents that are looked up again later.
    pub again: u64,
    /// Intents that need the attention of an operator from now on.
    pub need_attention: u64,
    /// Intents that were looked up for the last time and not found.
    pub closed: u64,
    /// Intents that were called again, settled or looked up by others in the meantime.
    pub lost: u64,
    /// Intents whose look-up could not be recorded because the store failed. They are looked up
    /// again later.
    pub failed: u64,
}

/// The outcome of a look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Found,
    TurnedUp,
    Absent,
    Again,
    Attention,
    Closed,
    Lost,
    Failed,
}

impl Outcome {
    /// Label of the metric.
    fn label(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::TurnedUp => "turned_up",
            Self::Absent => "absent",
            Self::Again => "again",
            Self::Attention => "attention",
            Self::Closed => "closed",
            Self::Lost => "lost",
            Self::Failed => "failed",
        }
    }
}

impl ReconcilerPass {
    fn count(&mut self, outcome: Outcome) {
        metrics::looked_up(outcome.label());
        let count = match outcome {
            Outcome::Found => &mut self.found,
            Outcome::Absent => &mut self.absent,
            Outcome::Again => &mut self.again,
            Outcome::TurnedUp | Outcome::Attention => &mut self.need_attention,
            Outcome::Closed => &mut self.closed,
            Outcome::Lost => &mut self.lost,
            Outcome::Failed => &mut self.failed,
        };
        *count += 1;
    }
}

impl Reconciler {
    pub(crate) async fn pass(&self, node: &Node) -> Result<ReconcilerPass, StoreError> {
        let recovery = node.recovery()?;
        let mut pass = ReconcilerPass::default();
        let pause = self.settings.taken_for();
        while !node.tasks.is_draining() {
            // Before the call: the store starts `pause` at some moment after this.
            let begun = Instant::now();
            let taken = recovery.take_dangling(self.settings.batch, pause).await?;
            pass.taken += taken.len() as u64;
            let last = u32::try_from(taken.len()).is_ok_and(|taken| taken < self.settings.batch);
            // After `pause` another node may take the rest: no look-up begins too late to be recorded.
            let in_time =
                || pause.saturating_sub(begun.elapsed()) >= self.settings.timeout.saturating_add(TO_RECORD);
            let may_begin = || !node.tasks.is_draining() && in_time();
            self.look_up_all(&recovery, taken, may_begin, &mut pass).await;
            if last {
                break;
            }
        }
        // Without the feature, the query would be made in vain.
        if metrics::ENABLED
            && let Ok(counts) = recovery.count_intents().await
        {
            metrics::intents(
                counts.open,
                counts.dangling,
                counts.need_attention,
                counts.oldest.unwrap_or_default(),
            );
        }
        Ok(pass)
    }

    async fn look_up_all(
        &self,
        recovery: &Arc<dyn RecoveryStore>,
        intents: Vec<Intent>,
        may_begin: impl Fn() -> bool,
        pass: &mut ReconcilerPass,
    ) {
        let concurrency = usize::try_from(self.settings.concurrency).unwrap_or(usize::MAX);
        let mut waiting = intents.into_iter();
        let mut running = JoinSet::new();
        loop {
            while running.len() < concurrency
                && may_begin()
                && let Some(intent) = waiting.next()
            {
                let (reconciler, recovery) = (self.clone(), Arc::clone(recovery));
                running.spawn(subscribed(async move { reconciler.look_up(&*recovery, intent).await }));
            }
            match running.join_next().await {
                Some(outcome) => pass.count(outcome.unwrap_or(Outcome::Failed)),
                None => return,
            }
        }
    }

    async fn look_up(&self, recovery: &dyn RecoveryStore, intent: Intent) -> Outcome {
        let intent = Arc::new(intent);
        let decision = match self.settings.without_asking(&intent) {
            Some(decision) => decision,
            None => {
                let lookup = self.ask(&intent).await.unwrap_or_else(|error| {
                    tracing::warn!(
                        target: TRACING_TARGET, intent = intent.name, upstream_key = %intent.upstream_key,
                        looks = intent.looks, error = &*error as &dyn std::error::Error,
                        "a look-up failed; the outcome of the call stays unknown"
                    );
                    Lookup::Unknown
                });
                self.settings.decide(&intent, lookup)
            }
        };
        let outcome = match record(recovery, &intent, &decision).await {
            Ok(Fenced::Applied) => decision.outcome,
            Ok(Fenced::Lost) => Outcome::Lost,
            Err(error) => {
                tracing::warn!(
                    target: TRACING_TARGET, intent = intent.name, upstream_key = %intent.upstream_key,
                    error = &error as &dyn std::error::Error,
                    "a look-up could not be recorded; the intent is looked up again later"
                );
                Outcome::Failed
            }
        };
        log(&intent, outcome, &decision);
        outcome
    }

    /// Calls the application's code in a task of its own, because it may panic.
    async fn ask(&self, intent: &Arc<Intent>) -> Result<Lookup, BoxError> {
        let (upstreams, intent) = (Arc::clone(&self.upstreams), Arc::clone(intent));
        let asked = tokio::spawn(subscribed(async move { upstreams.reconcile(&intent).await }));
        // A look-up changes nothing, so one that is too slow can be cut off.
        timeout(self.settings.timeout, AbortOnDropHandle::new(asked)).await??
    }
}

/// The change that a look-up makes to its intent.
#[derive(Debug)]
struct Decision {
    update: IntentUpdate,
    attention: Option<String>,
    outcome: Outcome,
}

impl Decision {
    fn new(update: IntentUpdate, outcome: Outcome) -> Self {
        Self { update, attention: None, outcome }
    }

    fn attention(update: IntentUpdate, attention: impl Into<String>, outcome: Outcome) -> Self {
        Self { update, attention: Some(attention.into()), outcome }
    }
}

impl Settings {
    /// Decides without a look-up: for a call that was not sent, and for an intent whose look-ups
    /// are used up.
    fn without_asking(&self, intent: &Intent) -> Option<Decision> {
        if intent.state == (IntentState::Open { sent: false }) {
            return Some(Decision::new(IntentUpdate::Absent(None), Outcome::Absent));
        }
        // One more to confirm an absence, and one more for the last look at what was declared absent.
        let last = if matches!(intent.state, IntentState::Open { .. }) { 1 } else { 2 };
        let permitted = self.max_lookups.saturating_add(last);
        (intent.looks > permitted).then(|| self.nothing_learned(intent))
    }

    fn decide(&self, intent: &Intent, lookup: Lookup) -> Decision {
        let open = matches!(intent.state, IntentState::Open { .. });
        match lookup {
            Lookup::Found(resource) if open => {
                Decision::new(IntentUpdate::Finalize(resource), Outcome::Found)
            }
            // It was declared absent, so a retry may have called again and made a second resource.
            Lookup::Found(resource) => {
                Decision::attention(IntentUpdate::Finalize(resource), TURNED_UP, Outcome::TurnedUp)
            }
            Lookup::NotFound if !open => Decision::new(IntentUpdate::Close, Outcome::Closed),
            // Not found twice, with a pause in between: the first may have come before the call arrived.
            Lookup::NotFound if intent.absences > 0 => {
                let recheck = Some(self.recheck_after).filter(|pause| !pause.is_zero());
                Decision::new(IntentUpdate::Absent(recheck), Outcome::Absent)
            }
            Lookup::NotFound => {
                let update = IntentUpdate::LookAgain { after: self.confirm_after, absences: 1 };
                Decision::new(update, Outcome::Again)
            }
            Lookup::Unknown if intent.looks >= self.max_lookups => self.nothing_learned(intent),
            Lookup::Unknown => {
                let after = self.backoff.jittered_after(intent.looks);
                Decision::new(IntentUpdate::LookAgain { after, absences: 0 }, Outcome::Again)
            }
        }
    }

    /// Never guesses: asks for attention. An intent that was declared absent stays absent.
    fn nothing_learned(&self, intent: &Intent) -> Decision {
        if matches!(intent.state, IntentState::Dead { .. }) {
            return Decision::new(IntentUpdate::Close, Outcome::Closed);
        }
        let attention = format!("looked up {} times without an answer", self.max_lookups.min(intent.looks));
        let update = IntentUpdate::LookAgain { after: Duration::ZERO, absences: intent.absences };
        Decision::attention(update, attention, Outcome::Attention)
    }
}

/// Records the decision, unless the intent was called again, settled or looked up by others in the
/// meantime.
async fn record(
    recovery: &dyn RecoveryStore,
    intent: &Intent,
    decision: &Decision,
) -> Result<Fenced, StoreError> {
    let give_up = Instant::now() + TO_RECORD;
    let (key, fence, attention) = (intent.upstream_key, intent.lookup_fence(), decision.attention.as_deref());
    let may_be_recorded = AtomicBool::new(false);
    let update = || recovery.update_intent(key, fence, &decision.update, attention);
    let recorded = retry_until(give_up, Backoff::new(PAUSE, PAUSE), update, |error| {
        may_be_recorded.fetch_or(error.kind() == StoreErrorKind::Ambiguous, Ordering::Relaxed);
    });
    if recorded.await? == Fenced::Applied {
        return Ok(Fenced::Applied);
    }
    // After a lost reply the fence fails because of the own update: then it was applied.
    let own = may_be_recorded.into_inner()
        && recovery.get_intent(key).await?.is_some_and(|found| is_recorded(&found, intent, &decision.update));
    Ok(if own { Fenced::Applied } else { Fenced::Lost })
}

/// Returns `true` if the intent is as the update makes it.
fn is_recorded(found: &Intent, taken: &Intent, update: &IntentUpdate) -> bool {
    let says_so = match (update, &found.state) {
        (IntentUpdate::Finalize(resource), IntentState::Finalized(recorded)) => resource == recorded,
        (IntentUpdate::Absent(_), IntentState::Dead { absent, .. }) => *absent,
        _ => false,
    };
    says_so && (found.call, found.takes) == (taken.call, taken.takes)
}

fn log(intent: &Intent, outcome: Outcome, decision: &Decision) {
    let (name, key, consumer) = (&intent.name, intent.upstream_key, &intent.consumer);
    match (outcome, &decision.attention, &decision.update) {
        (Outcome::TurnedUp, _, IntentUpdate::Finalize(resource)) => {
            report_turned_up(intent, resource);
        }
        (Outcome::Attention, Some(what), _) => {
            tracing::error!(
                target: TRACING_TARGET, intent = name, upstream_key = %key, %consumer, what,
                "an intent needs attention: an operator must resolve it"
            );
        }
        (Outcome::Found | Outcome::Absent, ..) => {
            tracing::info!(
                target: TRACING_TARGET, intent = name, upstream_key = %key, %consumer,
                outcome = outcome.label(),
                "a dangling intent is settled"
            );
        }
        _ => {
            tracing::debug!(
                target: TRACING_TARGET, intent = name, upstream_key = %key, %consumer,
                outcome = outcome.label(),
                "an intent was looked up"
            );
        }
    }
}

/// The pause between two tries to record a look-up.
const PAUSE: Duration = Duration::from_secs(1);
