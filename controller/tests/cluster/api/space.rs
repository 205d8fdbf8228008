//! What is refused while there is little room for the store, and what goes on.

use tonic::Code;

use crate::site::{LIMIT, Site, create, delete, migrate, reason, stop};

#[tokio::test]
async fn with_little_room_for_the_store_nothing_new_is_made_and_everything_else_goes_on() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    for name in ["web", "db"] {
        let operation = clients.create(name).await;
        clients.succeeded(operation).await;
    }
    site.kill();

    // No disk has so much.
    site.reserve_mib = u32::MAX;
    let mut clients = site.start().await;
    let refused = async {
        loop {
            // Looked at every few seconds, and first right after the start.
            if let Err(status) = clients.vms.create_vm(create("new")).await {
                return status;
            }
            clients.vms.delete_vm(delete("new")).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let status = tokio::time::timeout(LIMIT, refused).await.unwrap();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains("free some"), "{status:?}");
    assert_eq!(reason(Err::<(), _>(status)), "STORE_LOW_SPACE");
    assert_eq!(
        reason(clients.vms.migrate_vm(migrate("web")).await),
        "STORE_LOW_SPACE"
    );

    assert_eq!(clients.vm("web").await.name, "web");
    let operation = clients.vms.stop_vm(stop("web")).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    let operation = clients.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    site.kill();

    site.reserve_mib = 1;
    let mut clients = site.start().await;
    let operation = clients.create("new").await;
    clients.succeeded(operation).await;
}
