//! What is needed stays, and what is not goes; a VM that comes meanwhile waits.

use std::process::Command;

use super::*;
use crate::image::Format;

async fn with_copies(contents: &[Vec<u8>]) -> (Images, Memory) {
    let memory = Memory::new(1 << 40);
    for content in contents {
        let name = copy_name(&digest_of(content));
        memory.write(&name, 0, content.clone().into()).await.unwrap();
    }
    (open(Arc::new(memory.clone())).await, memory)
}

#[tokio::test]
async fn what_a_vm_holds_is_not_removed_and_what_nobody_holds_is() {
    let content = content(4096, 1);
    let (images, memory) = with_copies(std::slice::from_ref(&content)).await;
    let digest = digest_of(&content);
    images.hold(vm(1), [digest.clone()], false);
    images.hold(vm(2), [digest.clone()], true);
    // Before an entry without it is written the old one may still count.
    images.hold(vm(1), [], false);
    images.hold(vm(2), [], true);
    let refused = images.remove(&digest, None).await;
    assert!(matches!(refused, Err(Error::InUse(_))), "{refused:?}");
    assert!(images.copy_report(&digest).in_use);
    images.hold(vm(1), [], true);
    images.remove(&digest, None).await.unwrap();
    images.remove(&digest, None).await.unwrap();
    assert_eq!(whole(&memory).await, []);
    assert_eq!(images.inventory().images, []);
}

#[tokio::test]
async fn a_vm_that_comes_during_a_removal_waits_for_its_end_and_gets_a_new_copy() {
    let content = content(4096, 1);
    let (source, _) = with_copies(std::slice::from_ref(&content)).await;
    let digest = digest_of(&content);
    let there = fetching::serving(&source);
    let memory = Memory::new(1 << 40);
    memory
        .write(&copy_name(&digest), 0, content.clone().into())
        .await
        .unwrap();
    let images = open_with(
        Arc::new(memory.clone()),
        Arc::new(move |_: &Source| Ok(there.clone())),
    )
    .await;
    // The removal stands still after it has begun.
    let moving = images.0.moving.lock().await;
    let mut removal = Box::pin(images.remove(&digest, None));
    assert!(futures::poll!(&mut removal).is_pending());
    images.hold(vm(1), [digest.clone()], true);
    let need = fetching::need(&digest, content.len() as u64, &["h2"]);
    images.need(&need).expect_err("it is going");
    assert!(!images.copy_report(&digest).digest.is_empty());
    drop(moving);
    removal.await.unwrap();
    images.wait(&need, Duration::from_secs(60)).await.unwrap();
    assert_eq!(whole(&memory).await.len(), 1);
}

#[tokio::test]
async fn what_a_disk_here_has_behind_it_stays_though_nobody_knows_of_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (store, pool) = (dir.path().join("store"), dir.path().join("pool"));
    let files = Directory::open(
        &store,
        dir.path(),
        vec![pool.clone(), dir.path().join("none")],
        true,
    )
    .unwrap();
    std::fs::write(dir.path().join("a.raw"), content(1 << 20, 1)).unwrap();
    let images = open(Arc::new(files)).await;
    images
        .import(order(id(1), Origin::File("a.raw".into()), Format::Raw))
        .unwrap();
    let digest: Digest = ended(&images, id(1)).await.digest.parse().unwrap();
    let disk = pool.join("some-vm").join("root.qcow2");
    std::fs::create_dir_all(disk.parent().unwrap()).unwrap();
    std::fs::write(pool.join("a-file"), "x").unwrap();
    std::fs::write(disk.with_file_name("short.qcow2"), "x").unwrap();
    let copy = store.join(copy_name(&digest));
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .args([&copy, &disk])
        .status();
    assert!(made.unwrap().success());
    let refused = images.remove(&digest, None).await;
    assert!(matches!(refused, Err(Error::InUse(_))), "{refused:?}");
    assert!(copy.exists());
    std::fs::remove_file(disk).unwrap();
    images.remove(&digest, Some(id(1))).await.unwrap();
    assert!(!copy.exists());
}

#[tokio::test]
async fn an_import_is_forgotten_with_what_was_uploaded_and_its_copy_stays() {
    let (images, memory) = with_copies(&[]).await;
    let content = content(4096, 3);
    let mut upload = images.upload(id(1), 9000).await.unwrap();
    upload.take(0, content.clone().into()).await.unwrap();
    let mut forgetting = Box::pin(images.forget(id(1), true));
    assert!(
        futures::poll!(&mut forgetting).is_pending(),
        "its writer still writes"
    );
    let late = upload.take(4096, content.clone().into()).await;
    assert!(matches!(late, Err(Error::Busy)), "{late:?}");
    drop(upload);
    forgetting.await.unwrap();
    assert_eq!(memory.list().await.unwrap(), []);
    upload_all(&images, id(2), &content).await;
    images.import(order(id(2), Origin::Upload, Format::Raw)).unwrap();
    ended(&images, id(2)).await;
    // Whoever does not know that it has ended hears of its copy.
    assert!(!images.forget(id(2), true).await.unwrap());
    let left = images.import_report(id(2));
    assert!(
        left.phase() == ImagePhase::Ready && !left.digest.is_empty(),
        "{left:?}"
    );
    assert!(images.forget(id(2), false).await.unwrap());
    assert!(images.forget(id(2), true).await.unwrap());
    assert_eq!(whole(&memory).await.len(), 1);
    assert_eq!(memory.list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_copy_that_another_import_has_led_to_stays() {
    let (images, memory) = with_copies(&[]).await;
    let content = content(4096, 3);
    let digest = digest_of(&content);
    for number in [1, 2] {
        upload_all(&images, id(number), &content).await;
        images
            .import(order(id(number), Origin::Upload, Format::Raw))
            .unwrap();
        ended(&images, id(number)).await;
    }
    let refused = images.remove(&digest, Some(id(1))).await;
    assert!(matches!(refused, Err(Error::InUse(_))), "{refused:?}");
    assert_eq!(whole(&memory).await.len(), 1);
    // Both go: neither waits for the other.
    images.remove(&digest, Some(id(2))).await.unwrap();
    for number in [1, 2] {
        images.forget(id(number), false).await.unwrap();
    }
    assert_eq!(memory.list().await.unwrap(), []);
}
