//! What becomes of writes, by the handler's result.

use std::{convert::Infallible, pin::Pin};

use axum::{
    Extension,
    body::Body,
    http::{Request, StatusCode},
    response::Response,
};
use tower::{ServiceBuilder, ServiceExt};
use tower_idempotency::{Directive, RejectionCode, ResultPolicy, TransactionOptions, Tx, layer::RequestBody};

use crate::{
    bank::{Bank, Db, End, Node, charge, on_both_stores, unique, with_both_strategies},
    support::{direct, served::Count},
};

// The strategy of a single transaction has none of this.
on_both_stores!(at_most_once_stores_server_errors_without_their_writes_and_holds_after_a_panic);

with_both_strategies!(
    successes_and_redirects_are_committed_with_their_response,
    a_client_error_is_stored_without_the_writes,
    writes_of_client_errors_are_kept_if_that_is_set,
    results_that_are_not_stored_leave_nothing,
    an_error_of_the_inner_service_leaves_nothing,
    a_panic_leaves_nothing,
    directives_decide_on_the_record_and_never_keep_more_writes,
    savepoints_of_the_handler_are_its_own_affair,
);

async fn successes_and_redirects_are_committed_with_their_response<DB: Db>(bank: Bank<DB>) {
    for status in [200, 201, 204, 303] {
        bank.check(&answering(&bank, status), status, 1, End::Stored).await;
    }
}

async fn a_client_error_is_stored_without_the_writes<DB: Db>(bank: Bank<DB>) {
    for status in [402, 422] {
        bank.check(&answering(&bank, status), status, 0, End::Stored).await;
    }
}

async fn writes_of_client_errors_are_kept_if_that_is_set<DB: Db>(bank: Bank<DB>) {
    let options = TransactionOptions::default().keep_writes_of_client_errors();
    for (status, charges, end) in [(422, 1, End::Stored), (429, 0, End::Released), (500, 0, End::Released)] {
        let layer = bank.layer().with_transactions(options.clone());
        bank.check(&bank.node(layer, with_status::<DB>(status)), status, charges, end).await;
    }
}

async fn results_that_are_not_stored_leave_nothing<DB: Db>(bank: Bank<DB>) {
    for status in [401, 429, 500, 503] {
        bank.check(&answering(&bank, status), status, 0, End::Released).await;
    }
}

async fn an_error_of_the_inner_service_leaves_nothing<DB: Db>(bank: Bank<DB>) {
    let runs = Count::default();
    let counter = runs.clone();
    let inner = tower::service_fn(move |request: Request<RequestBody<Body>>| {
        let (run, begun) = (counter.add(), Tx::<DB>::begin(request.extensions()));
        async move {
            charge(&mut begun.await.unwrap()).await;
            match run {
                1 => Err(std::io::Error::other("inner error")),
                _ => Ok(Response::new(Body::from("fine"))),
            }
        }
    });
    let service = ServiceBuilder::new().layer(bank.layer()).service(inner);
    let error = service.clone().oneshot(direct::charge("k")).await.unwrap_err();
    assert_eq!((error.to_string().as_str(), bank.charges().await), ("inner error", 0));
    assert_eq!(service.clone().oneshot(direct::charge("k")).await.unwrap().status(), StatusCode::OK);
    assert_eq!(service.oneshot(direct::charge("k")).await.unwrap().status(), StatusCode::OK);
    assert_eq!((runs.get(), bank.charges().await), (2, 1));
}

async fn a_panic_leaves_nothing<DB: Db>(bank: Bank<DB>) {
    let node = bank.node(bank.layer(), panicking::<DB>);
    bank.check(&node, RejectionCode::HandlerPanicked, 0, End::Released).await;
}

async fn at_most_once_stores_server_errors_without_their_writes_and_holds_after_a_panic<DB: Db>(
    bank: Bank<DB>,
) {
    let layer = || bank.layer().with_policy(ResultPolicy::at_most_once());
    bank.check(&bank.node(layer(), with_status::<DB>(500)), 500, 0, End::Stored).await;
    bank.check(&bank.node(layer(), panicking::<DB>), RejectionCode::HandlerPanicked, 0, End::Held).await;
}

async fn directives_decide_on_the_record_and_never_keep_more_writes<DB: Db>(bank: Bank<DB>) {
    let cases = [
        (500, Directive::Store, End::Stored, 0),
        (429, Directive::Store, End::Stored, 0),
        (201, Directive::Store, End::Stored, 1),
        (201, Directive::Release, End::Released, 0),
        (201, Directive::Hold, End::Held, 0),
        (422, Directive::Hold, End::Held, 0),
    ];
    for (status, directive, end, charges) in cases {
        let handler = move |mut tx: Tx<DB>| async move {
            charge(&mut tx).await;
            (Extension(directive), unique(StatusCode::from_u16(status).unwrap()))
        };
        bank.check(&bank.node(bank.layer(), handler), status, charges, end).await;
    }
}

async fn savepoints_of_the_handler_are_its_own_affair<DB: Db>(bank: Bank<DB>) {
    use sqlx::Connection;

    let handler = |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        let mut kept = tx.begin().await.unwrap();
        DB::run(&mut kept, "INSERT INTO charges (amount) VALUES (1)").await.unwrap();
        kept.commit().await.unwrap();
        let mut undone = tx.begin().await.unwrap();
        DB::run(&mut undone, "INSERT INTO charges (amount) VALUES (10)").await.unwrap();
        undone.rollback().await.unwrap();
        let mut failed = tx.begin().await.unwrap();
        DB::run(&mut failed, "INSERT INTO charges (amount) VALUES (NULL)").await.unwrap_err();
        failed.rollback().await.unwrap();
        let mut dropped = tx.begin().await.unwrap();
        DB::run(&mut dropped, "INSERT INTO charges (amount) VALUES (100)").await.unwrap();
        drop(dropped);
        unique(StatusCode::CREATED)
    };
    bank.check(&bank.node(bank.layer(), handler), 201, 2, End::Stored).await;
    assert_eq!(bank.number("SELECT sum(amount) FROM charges").await, 2001);
}

fn answering<DB: Db>(bank: &Bank<DB>, status: u16) -> Node {
    bank.node(bank.layer(), with_status::<DB>(status))
}

fn with_status<DB: Db>(status: u16) -> impl Fn(Tx<DB>) -> Answering + Clone + Send + Sync + 'static {
    move |mut tx| {
        Box::pin(async move {
            charge(&mut tx).await;
            unique(StatusCode::from_u16(status).unwrap())
        })
    }
}

type Answering = Pin<Box<dyn Future<Output = Response> + Send>>;

async fn panicking<DB: Db>(mut tx: Tx<DB>) -> Infallible {
    charge(&mut tx).await;
    panic!("the handler breaks");
}
