//! What becomes of writes, where the status line is not the result: gRPC, redirects to elsewhere, missing routes, streams.

use std::{convert::Infallible, pin::Pin};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Redirect, Response},
    routing::any,
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use tokio_stream::StreamExt;
use tower::Layer;
use tower_idempotency::{ResultPolicy, TransactionOptions, Tx};

use crate::{
    bank::{Bank, Db, End, Node, charge, on_both_stores, with_both_strategies},
    support::served::Count,
};

// The strategy of a single transaction has none of this.
on_both_stores!(
    at_most_once_stores_a_grpc_status_without_the_writes,
    a_404_after_writes_is_stored_without_them_wherever_the_layer_is,
);

with_both_strategies!(
    only_an_ok_of_grpc_is_committed,
    a_grpc_status_in_the_head_decides_on_the_writes,
    writes_of_grpc_client_errors_are_kept_if_that_is_set,
    a_redirect_of_the_request_itself_leaves_nothing,
    a_body_that_is_not_stored_may_have_the_transaction,
);

const MESSAGE: &[u8] = b"\0\0\0\0\x02\x08\x07";

fn grpc(code: &'static str) -> Response {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", code.parse().unwrap());
    let body = Full::from(MESSAGE).with_trailers(async { Some(Ok(trailers)) });
    ([("content-type", "application/grpc")], Body::new(body)).into_response()
}

fn answering<DB: Db>(
    answer: impl Fn() -> Response + Clone + Send + Sync + 'static,
) -> impl Fn(Tx<DB>) -> Pin<Box<dyn Future<Output = Response> + Send>> + Clone + Send + Sync + 'static {
    move |mut tx| {
        let answer = answer.clone();
        Box::pin(async move {
            charge(&mut tx).await;
            answer()
        })
    }
}

async fn only_an_ok_of_grpc_is_committed<DB: Db>(bank: Bank<DB>) {
    let cases =
        [("0", 1, End::Stored), ("3", 0, End::Stored), ("13", 0, End::Released), ("14", 0, End::Released)];
    for (code, charges, end) in cases {
        let node = bank.node(bank.layer(), answering::<DB>(move || grpc(code)));
        bank.check(&node, 200, charges, end).await;
    }
}

async fn a_grpc_status_in_the_head_decides_on_the_writes<DB: Db>(bank: Bank<DB>) {
    for (code, charges, end) in [("0", 1, End::Stored), ("6", 0, End::Stored), ("14", 0, End::Released)] {
        let answer = move || [("content-type", "application/grpc"), ("grpc-status", code)].into_response();
        bank.check(&bank.node(bank.layer(), answering::<DB>(answer)), 200, charges, end).await;
    }
}

async fn at_most_once_stores_a_grpc_status_without_the_writes<DB: Db>(bank: Bank<DB>) {
    let layer = bank.layer().with_policy(ResultPolicy::at_most_once());
    let node = bank.node(layer, answering::<DB>(|| grpc("14")));
    bank.check(&node, 200, 0, End::Stored).await;
}

async fn writes_of_grpc_client_errors_are_kept_if_that_is_set<DB: Db>(bank: Bank<DB>) {
    let options = TransactionOptions::default().keep_writes_of_client_errors();
    for (code, charges, end) in [("3", 1, End::Stored), ("14", 0, End::Released)] {
        let layer = bank.layer().with_transactions(options.clone());
        bank.check(&bank.node(layer, answering::<DB>(move || grpc(code))), 200, charges, end).await;
    }
}

async fn a_redirect_of_the_request_itself_leaves_nothing<DB: Db>(bank: Bank<DB>) {
    for (status, redirect) in [(307, Redirect::temporary("/x")), (308, Redirect::permanent("/x"))] {
        let answer = move || redirect.clone().into_response();
        bank.check(&bank.node(bank.layer(), answering::<DB>(answer)), status, 0, End::Released).await;
    }
}

async fn a_404_after_writes_is_stored_without_them_wherever_the_layer_is<DB: Db>(bank: Bank<DB>) {
    for status in [StatusCode::NOT_FOUND, StatusCode::METHOD_NOT_ALLOWED, StatusCode::SERVICE_UNAVAILABLE] {
        let layer = bank.layer().with_policy(ResultPolicy::at_most_once());
        let runs = Count::default();
        let counter = runs.clone();
        let handler = move |mut tx: Tx<DB>| {
            counter.add();
            async move {
                charge(&mut tx).await;
                status
            }
        };
        let inner = Router::new().route("/charges", any(handler));
        let router = Router::new().fallback_service(layer.layer(inner));
        let node = Node::new(layer.disabled(), router, runs);
        bank.check(&node, status.as_u16(), 0, End::Stored).await;
    }
}

/// It is read to its end, which gives the transaction back.
async fn a_body_that_is_not_stored_may_have_the_transaction<DB: Db>(bank: Bank<DB>) {
    let handler = |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        let pieces = tokio_stream::once(tx).then(|mut tx| async move {
            charge(&mut tx).await;
            Ok::<_, Infallible>(Bytes::from("not now"))
        });
        (StatusCode::SERVICE_UNAVAILABLE, Body::from_stream(pieces)).into_response()
    };
    bank.check(&bank.node(bank.layer(), handler), 503, 0, End::Released).await;
}
