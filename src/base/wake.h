/*-------------------------------------------------------------------------
 *
 * wake.h
 *	  Wake-ups that take effect when the transaction commits.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_WAKE_H
#define REDRIVE_WAKE_H

#include "datatype/timestamp.h"

#include "base/shmem.h"

extern void redrive_wake_at_commit(Oid owner, int64 batch_id);
extern void redrive_wake_supervisor_at_commit(void);
extern void redrive_wake_supervisor_by(TimestampTz at);
extern void redrive_wake_pusher_at_commit(void);
extern void redrive_fold_at_commit(void);
extern void redrive_wake_claimers_at_commit(Oid owner);
extern RedriveClaimers *redrive_claimers(Oid owner);
extern void redrive_wake_now(Oid owner, bool all, int64 batch_id);
extern void redrive_batch_ended_at_commit(void);
extern void redrive_wake_prepared(void);
extern void redrive_wake_launcher(void);

#endif							/* REDRIVE_WAKE_H */
