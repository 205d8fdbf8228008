//! Changes of images: their records, and the indices by name, digest and VM, and by the hosts that have copies.

use std::sync::Arc;

use dalgu_proto::{
    ids::{HostName, ImageId},
    image::Digest,
};

use super::{Table, Tx, json};
use crate::model::{
    EventKind, HeldImage, HostLive, ImageRecord, ImageState, ImageStock, Visibility, VmRecord,
};

impl Tx {
    pub(in crate::state) fn index_image(&mut self, image: Arc<ImageRecord>) {
        if let Some(old) = self.state.images.get(&image.id).cloned() {
            self.forget_image_digest(&old);
        }
        if let Some(digest) = image.digest() {
            let images = self.state.image_digests.entry(digest.clone()).or_default();
            images.insert(image.id);
        }
        let key = (image.name.clone(), image.version.clone());
        self.state.image_names.insert(key, image.id);
        self.state.images.insert(image.id, image);
        self.touch_images();
    }

    /// Puts an image.
    pub fn put_image(&mut self, mut image: ImageRecord) {
        image.revision = self.revision();
        self.write(Table::Images, image.id, Some(json(&image)));
        self.index_image(Arc::new(image));
    }

    /// Removes an image and all that is known of it.
    pub fn delete_image(&mut self, id: ImageId) {
        let Some(old) = self.state.images.remove(&id) else {
            return;
        };
        self.forget_image_digest(&old);
        let key = (old.name.clone(), old.version.clone());
        self.state.image_names.remove(&key);
        self.state.image_gone.remove(&id);
        self.write(Table::Images, id, None);
        self.touch_images();
    }

    fn forget_image_digest(&mut self, image: &ImageRecord) {
        let Some(digest) = image.digest() else { return };
        if let Some(images) = self.state.image_digests.get_mut(digest) {
            images.remove(&image.id);
            if images.is_empty() {
                self.state.image_digests.remove(digest);
            }
        }
    }

    /// Tells of a change of an image: everybody, or where it is private its owner.
    pub fn image_event(&mut self, image: &ImageRecord, reason: &str, message: impl Into<String>) {
        let only_for = match image.visibility {
            Visibility::Public => None,
            Visibility::Private => Some(image.owner.clone()),
        };
        let subject = image.reference();
        self.tell(EventKind::Image, reason, subject, message.into(), None, only_for);
    }

    /// Asks for another look at the images.
    pub fn touch_images(&mut self) {
        self.state.image_changes += 1;
    }

    pub(super) fn note_image_vm(&mut self, vm: &VmRecord) {
        for digest in vm.spec.disks.iter().filter_map(|disk| disk.digest.as_ref()) {
            let vms = self.state.image_vms.entry(digest.clone()).or_default();
            vms.insert(vm.id);
        }
    }

    pub(super) fn forget_image_vm(&mut self, vm: &VmRecord) {
        for digest in vm.spec.disks.iter().filter_map(|disk| disk.digest.as_ref()) {
            if let Some(vms) = self.state.image_vms.get_mut(digest) {
                vms.remove(&vm.id);
                if vms.is_empty() {
                    self.state.image_vms.remove(digest);
                }
            }
        }
    }

    /// Keeps the index of copies right when what is known of a host changes.
    pub(super) fn note_stock(&mut self, host: &HostName, new: &HostLive) {
        let old = self.state.live.get(host).cloned();
        let same_state = old.as_ref().is_some_and(|old| old.state == new.state);
        let old = old.and_then(|old| old.images.clone());
        match (&old, &new.images) {
            // The same value: nothing was told.
            (Some(old), Some(new)) if Arc::ptr_eq(old, new) && same_state => return,
            (None, None) if same_state => return,
            _ => {}
        }
        self.index_copies(host, old.as_deref(), false);
        self.index_copies(host, new.images.as_deref(), true);
        self.touch_images();
    }

    pub(super) fn forget_stock(&mut self, host: &HostName) {
        let old = self.state.live.get(host).and_then(|old| old.images.clone());
        self.index_copies(host, old.as_deref(), false);
        self.touch_images();
    }

    fn index_copies(&mut self, host: &HostName, stock: Option<&ImageStock>, add: bool) {
        let copies = stock.into_iter().flat_map(|stock| &stock.copies);
        for (digest, _) in copies {
            let hosts = self.state.image_hosts.entry(digest.clone()).or_default();
            if add {
                hosts.insert(host.clone())
            } else {
                hosts.remove(host)
            };
            if hosts.is_empty() {
                self.state.image_hosts.remove(digest);
            }
        }
    }

    fn change_stock(&mut self, host: &HostName, change: impl FnOnce(&mut ImageStock)) {
        let Some(live) = self.state.live.get(host).cloned() else {
            return;
        };
        let mut stock = live.images.as_deref().cloned().unwrap_or_default();
        change(&mut stock);
        let live = HostLive {
            images: Some(Arc::new(stock)),
            ..(*live).clone()
        };
        self.set_live(host.clone(), live);
    }

    /// Notes what a host answered of one import or copy. Not stored.
    pub fn note_held(&mut self, host: &HostName, held: HeldImage) {
        self.change_stock(host, |stock| stock.put(held));
    }

    /// Notes that a host has answered that nothing is left there of what was to be removed. Not stored.
    pub fn note_removed(&mut self, host: &HostName, digest: Option<&Digest>, image: Option<ImageId>) {
        self.change_stock(host, |stock| {
            digest.map(|digest| stock.copies.remove(digest));
            image.map(|image| stock.imports.remove(&image));
        });
        let deleting = |id: &ImageId| {
            let image = self.state.images.get(id);
            image.is_some_and(|image| image.state == ImageState::Deleting)
        };
        if let Some(id) = image.filter(deleting) {
            self.state.image_gone.entry(id).or_default().insert(host.clone());
            self.touch_images();
        }
    }
}
