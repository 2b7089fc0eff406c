//! One pass: takes intents, looks them up, records what was learned.

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

use crate::recovery::reconciler::{Lookup, Reconciler, Settings, TO_RECORD};
use crate::{
    attempt::settle::{TURNED_UP, report_turned_up},
    error::{BoxError, StoreError, StoreErrorKind},
    metrics,
    node::Node,
    redact::TRACING_TARGET,
    retry::{Backoff, retry_until},
    store::recovery::RecoveryStore,
    stored::{
        intent::{Intent, IntentState, IntentUpdate},
        record::Fenced,
    },
};

/// What one pass of a [`Reconciler`] came to: how many intents each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReconcilerPass {
    /// Were taken. Those that the pass did not come to are in none of the other counts, and are taken again later.
    pub taken: u64,
    /// Were found, and are finalized now.
    pub found: u64,
    /// Were not found twice or certainly not sent, and may be called again now.
    pub absent: u64,
    /// Are looked up again later.
    pub again: u64,
    /// Need attention now.
    pub need_attention: u64,
    /// Were not found a last time.
    pub closed: u64,
    /// Were called again, settled or looked up by others meanwhile.
    pub lost: u64,
    /// Could not be recorded because of an error of the store, and are looked up again later.
    pub failed: u64,
}

/// What a look-up came to.
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
            let begun = Instant::now();
            let taken = recovery.take_dangling(self.settings.batch, pause).await?;
            pass.taken += taken.len() as u64;
            let last = u32::try_from(taken.len()).is_ok_and(|taken| taken < self.settings.batch);
            // Whoever is late leaves the rest to those who take it next.
            let in_time =
                || pause.saturating_sub(begun.elapsed()) >= self.settings.timeout.saturating_add(TO_RECORD);
            let may_begin = || !node.tasks.is_draining() && in_time();
            self.look_up_all(&recovery, taken, may_begin, &mut pass).await;
            if last {
                break;
            }
        }
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
                running.spawn(async move { reconciler.look_up(&*recovery, intent).await });
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
                        looks = intent.looks, error = &*error as &dyn std::error::Error, "a look-up failed"
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
                    error = &error as &dyn std::error::Error, "a look-up could not be recorded; it is done again"
                );
                Outcome::Failed
            }
        };
        log(&intent, outcome, &decision);
        outcome
    }

    /// Asks the user's code, in a task of its own: it may panic.
    async fn ask(&self, intent: &Arc<Intent>) -> Result<Lookup, BoxError> {
        let (upstreams, intent) = (Arc::clone(&self.upstreams), Arc::clone(intent));
        let asked = tokio::spawn(async move { upstreams.reconcile(&intent).await });
        timeout(self.settings.timeout, AbortOnDropHandle::new(asked)).await??
    }
}

/// What is to be recorded of a look-up.
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
    /// What needs no look-up: a call that was not sent, and one that nobody has come to the end of looking up.
    fn without_asking(&self, intent: &Intent) -> Option<Decision> {
        if intent.state == (IntentState::Open { sent: false }) {
            return Some(Decision::new(IntentUpdate::Absent(None), Outcome::Absent));
        }
        // The last permitted look-up may be the first that did not find it. What was declared absent is looked up once more.
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
            Lookup::Found(resource) => {
                Decision::attention(IntentUpdate::Finalize(resource), TURNED_UP, Outcome::TurnedUp)
            }
            Lookup::NotFound if !open => Decision::new(IntentUpdate::Close, Outcome::Closed),
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

    /// Never a guess. What was declared absent stays so.
    fn nothing_learned(&self, intent: &Intent) -> Decision {
        if matches!(intent.state, IntentState::Dead { .. }) {
            return Decision::new(IntentUpdate::Close, Outcome::Closed);
        }
        let attention = format!("looked up {} times without an answer", self.max_lookups.min(intent.looks));
        let update = IntentUpdate::LookAgain { after: Duration::ZERO, absences: intent.absences };
        Decision::attention(update, attention, Outcome::Attention)
    }
}

/// Records it, unless the intent was called again, settled or looked up by others meanwhile.
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
    let own = may_be_recorded.into_inner()
        && recovery.get_intent(key).await?.is_some_and(|found| is_recorded(&found, intent, &decision.update));
    Ok(if own { Fenced::Applied } else { Fenced::Lost })
}

/// Whether the intent is what the update makes of it.
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
                target: TRACING_TARGET, intent = name, upstream_key = %key, %consumer, outcome = outcome.label(),
                "a dangling intent is settled"
            );
        }
        _ => {
            tracing::debug!(
                target: TRACING_TARGET, intent = name, upstream_key = %key, %consumer, outcome = outcome.label(),
                "an intent was looked up"
            );
        }
    }
}

/// Between two tries to record a look-up.
const PAUSE: Duration = Duration::from_secs(1);
