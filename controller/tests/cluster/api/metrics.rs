//! The page for scrapers.

use dalgu_proto::tls::{self, Identity};

use crate::site::{Site, delete, eventually};

#[tokio::test]
async fn the_metrics_page_shows_what_is_there() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    let identity = Identity::load_dir(site.dir.path(), "admin").unwrap();
    let address = site.endpoint().trim_start_matches("https://").to_owned();
    let read = || async {
        let alpn = tls::ALPN_HTTP1;
        let mut io = tls::client::open_stream(&address, tls::CONTROLLER_NAME, &identity, alpn)
            .await
            .unwrap();
        io.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut page = String::new();
        io.read_to_string(&mut page).await.unwrap();
        page
    };
    let page = read().await;
    for line in [
        "dalgu_controller_vms{state=\"running\"} 1",
        "dalgu_controller_hosts{state=\"ready\"} 1",
        "dalgu_controller_operations{kind=\"create\",state=\"succeeded\"} 1",
        "dalgu_controller_images{state=\"available\"} 0",
        "dalgu_controller_image_upload_bytes_total 0",
        "dalgu_controller_host_vms_reserved{host=\"h1\"} 1",
        "dalgu_controller_host_memory_reserved_bytes{host=\"h1\"}",
        "dalgu_controller_store_commit_duration_seconds_count",
        "dalgu_controller_reconcile_passes_total",
        "dalgu_controller_migration_downtime_seconds_count 0",
        "dalgu_controller_migration_network_blackout_seconds_count 0",
    ] {
        assert!(page.contains(line), "{line} is not in\n{page}");
    }
    let deleted = clients.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    clients.succeeded(deleted).await;
    let empty = || async { read().await.contains("dalgu_controller_vms{state=\"running\"} 0") };
    eventually("it is gone from the page", empty).await;
}
