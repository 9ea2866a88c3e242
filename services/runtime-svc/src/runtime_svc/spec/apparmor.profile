# crisp's default AppArmor profile (SecurityProfile RuntimeDefault), which runtime-svc loads when it starts.
# It denies what namespaces do not: writing to the kernel's settings in /proc and /sys, mounting, and
# tracing processes of other containers.
#include <tunables/global>

profile crisp-default flags=(attach_disconnected,mediate_deleted) {
  #include <abstractions/base>

  network,
  capability,
  file,
  umount,

  # Signals come from the node (kubelet, conmon, the OCI runtime) and from the container itself.
  signal (receive) peer=unconfined,
  signal (receive) peer=/usr/bin/{crun,conmon},
  signal (receive) peer=/usr/{s,}bin/runc,
  signal (send,receive) peer=crisp-default,
  ptrace (trace,read,tracedby,readby) peer=crisp-default,

  deny mount,

  # Settings of the whole node cannot be changed. Those of a pod's own namespaces are in net, fs/mqueue
  # and kernel/{shm,msg,sem}*.
  deny @{PROC}/{acpi,asound,bus,driver,dynamic_debug,fs,irq,scsi,tty}/** wklx,
  deny @{PROC}/{sysrq-trigger,latency_stats,timer_list,timer_stats,sched_debug} rwklx,
  deny @{PROC}/{kcore,keys,key-users,kallsyms,kpagecgroup,kpagecount,kpageflags,mem,kmem} rwklx,
  deny @{PROC}/sys/{abi,crypto,debug,dev,sunrpc,user,vm,xen}/** wklx,
  deny @{PROC}/sys/fs/[^m]** wklx,
  deny @{PROC}/sys/kernel/{core_pattern,core_uses_pid,core_pipe_limit,hotplug,modprobe,modules_disabled,kexec_load_disabled} wklx,
  deny @{PROC}/sys/kernel/{panic*,printk*,randomize_va_space,perf_*,sched_*,sysrq,usermodehelper/**,yama/**,unprivileged_*,kptr_restrict,dmesg_restrict} wklx,
  deny /sys/{block,bus,class,dev,devices,firmware,hypervisor,kernel,module,power}/** wklx,
  deny /sys/fs/{bpf,btrfs,ext4,fuse,nfs*,pstore,resctrl,selinux,smackfs,xfs}/** wklx,
  deny /sys/{firmware,kernel/security,devices/virtual/powercap}/** r,
}
