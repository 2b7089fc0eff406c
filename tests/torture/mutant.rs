pub async fn run(_: &crate::Run) {}
