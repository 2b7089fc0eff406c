//! A store that opens and settles intents as the test says.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::Notify;
use tower_idempotency::{
    StoreError, UpstreamKey,
    store::{Fenced, IntentFence, IntentUpdate, OpenOutcome, Opening, RecoveryStore, Store, StoreErrorKind},
};

use crate::{bank::Gate, support::forward::forward};

/// What becomes of a call that opens or settles an intent.
#[derive(Clone, Debug)]
pub(crate) enum Hook {
    /// It fails, as if the store could not be reached.
    Fail,
    /// It is carried out, and its reply is lost.
    LoseReply,
    /// It waits at the gate first.
    WaitBefore(Gate),
    /// It waits at the gate once it is carried out.
    WaitAfter(Gate),
    /// It is carried out, and this is notified just before its reply arrives.
    NotifyAfter(Arc<Notify>),
}

/// A store behind which another one works. Clones share their hooks, each of which is for one call, in order.
#[derive(Clone, Debug)]
pub(crate) struct Hooked {
    store: Arc<dyn Store>,
    hooks: Arc<Hooks>,
}

#[derive(Debug, Default)]
struct Hooks {
    opening: Mutex<VecDeque<Hook>>,
    settling: Mutex<VecDeque<Hook>>,
}

impl Hooked {
    pub(crate) fn new(store: &Arc<dyn Store>) -> Self {
        Self { store: Arc::clone(store), hooks: Arc::default() }
    }

    pub(crate) fn on_opening(self, hook: Hook) -> Self {
        push(&self.hooks.opening, hook);
        self
    }

    pub(crate) fn on_settling(self, hook: Hook) -> Self {
        push(&self.hooks.settling, hook);
        self
    }
}

#[async_trait::async_trait]
impl Store for Hooked {
    forward!(store: prepare claim renew complete release hold get list evict resolve transaction begin_single purge close);

    fn recovery(&self) -> Option<Arc<dyn RecoveryStore>> {
        let store = self.store.recovery()?;
        Some(Arc::new(HookedRecovery { store, hooks: Arc::clone(&self.hooks) }))
    }
}

#[derive(Debug)]
struct HookedRecovery {
    store: Arc<dyn RecoveryStore>,
    hooks: Arc<Hooks>,
}

#[async_trait::async_trait]
impl RecoveryStore for HookedRecovery {
    forward!(store:
        take_dangling count_overlooked get_intent list_intents count_intents
        find_phase keep_request retain_record take_abandoned update_request
        list_requests purge_settled
    );

    async fn open_intent(&self, opening: &Opening) -> Result<OpenOutcome, StoreError> {
        carry_out(&self.hooks.opening, self.store.open_intent(opening)).await
    }

    async fn update_intent(
        &self,
        intent: UpstreamKey,
        fence: IntentFence,
        update: &IntentUpdate,
        attention: Option<&str>,
    ) -> Result<Fenced, StoreError> {
        carry_out(&self.hooks.settling, self.store.update_intent(intent, fence, update, attention)).await
    }
}

async fn carry_out<T>(
    hooks: &Mutex<VecDeque<Hook>>,
    call: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    let hook = hooks.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    match hook {
        None => call.await,
        Some(Hook::Fail) => Err(StoreError::new(StoreErrorKind::Unavailable, "told to fail")),
        Some(Hook::LoseReply) => {
            call.await?;
            Err(StoreError::new(StoreErrorKind::Ambiguous, "told to lose the reply"))
        }
        Some(Hook::WaitBefore(gate)) => {
            gate.pass().await;
            call.await
        }
        Some(Hook::WaitAfter(gate)) => {
            let reply = call.await;
            gate.pass().await;
            reply
        }
        Some(Hook::NotifyAfter(notify)) => {
            let reply = call.await;
            notify.notify_waiters();
            reply
        }
    }
}

fn push(hooks: &Mutex<VecDeque<Hook>>, hook: Hook) {
    hooks.lock().unwrap_or_else(PoisonError::into_inner).push_back(hook);
}
