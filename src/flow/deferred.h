/*-------------------------------------------------------------------------
 *
 * deferred.h
 *	  Deferred constraints of users, fired before a segment ends.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_DEFERRED_H
#define REDRIVE_DEFERRED_H

extern void redrive_load_deferred(void);
extern bool redrive_commit_after_segment(void);
extern void redrive_fire_deferred(void);
extern void redrive_check_user_command(Node *command);

#endif							/* REDRIVE_DEFERRED_H */
